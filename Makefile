# Two commands on a fresh machine: `make quickstart` and `make test`. Each sets itself up first.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 6
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check kernels gpu format bench clean

help: ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: .venv/installed ## the environment in .venv, from pyproject.toml and constraints.txt

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "latentae needs Python 3.11 or newer; set PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch .venv/installed

quickstart: install ## the whole line on photos that ship with the dependencies; MINUTES=6 of training
	$(BIN)/python -m latentae quickstart --out quickstart --minutes $(MINUTES)

PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --durations 10 --durations-min 2

test: install ## the tests, about 5 minutes; JOBS=2 processes with one thread each
	$(PYTEST) -m "not slow"

test-all: install ## all tests, with the slow ones: kills, full-size tiling, compilation, the quickstart
	$(PYTEST)

check: install ## linter, formatter, types, import direction, and that every test can be collected
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --collect-only -qq --no-summary

kernels: install ## every kernel compiled for sm_80, sm_90 and sm_100, with its gates
	env -u TRITON_INTERPRET $(BIN)/python -m latentae_kernels.aot

gpu: install ## on a machine with a GPU: kernels and steps tested there, races looked for, then every benchmark into benchmarks/
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/kernels tests/models/test_fuse.py tests/models/test_dc_fuse.py tests/training/test_steps.py
	@! command -v compute-sanitizer >/dev/null || for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool $(BIN)/python -m pytest -x tests/kernels/test_row_norm_act.py tests/kernels/test_lpips_head.py || exit 1; done
	$(BIN)/python tools/bench_kernels.py
	$(BIN)/python tools/bench_training.py
	$(BIN)/python tools/bench_autoencoder.py
	$(BIN)/python tools/bench_encode.py --batch 16 --images 256 --shard-size 64
	$(BIN)/python tools/kernel_tables.py

format: install ## let the formatter and the linter mend what they can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## every kernel beside plain torch on this machine, into benchmarks/ and the tables of kernels/README.md
	$(BIN)/python tools/bench_kernels.py
	$(BIN)/python tools/kernel_tables.py

clean: ## what the other commands made, but not .venv
	rm -rf quickstart build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
