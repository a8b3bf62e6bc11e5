"""Programs of tools/ run in this process: each in its own would import torch and diffusers for
seconds first.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[object, str]]]:
    """`run("bench_data", "--images", 4)` gives the program's exit code and everything that it
    printed.
    """
    monkeypatch.syspath_prepend(TOOLS)
    threads = torch.get_num_threads()

    def call(name: str, *arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a program that warns does not fail
            try:
                code = importlib.import_module(name).main()
            except SystemExit as stop:
                code = stop.code
        output = "".join(capsys.readouterr())
        return (1, output + code) if isinstance(code, str) else (code or 0, output)

    yield call
    torch.set_num_threads(threads)
    if "diffusers" in sys.modules:
        sys.modules["diffusers"].utils.logging.set_verbosity_warning()  # the programs turn it down
