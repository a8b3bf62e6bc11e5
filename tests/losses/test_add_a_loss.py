"""docs/add_a_loss.md, done as written, in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latentae.losses.objective import regularizer
from latentae.losses.options import REGULARIZERS, LossOptions

ROOT = Path(__file__).resolve().parents[2]
LINE = "latentae/losses/options.py, in REGULARIZERS"
# One process for all of it: most of its time goes into imports.
STEPS = """
import pytest
from latentae.cli import main

assert pytest.main(["-q", "-p", "no:cacheprovider", "tests/losses/test_smoothness.py"]) == 0
for arguments in (["smooth-tiny.toml", "--output", "run", "--log.metrics-every-images", "4"], ["--help"]):
    try:
        main(["train", *arguments])
    except SystemExit as end:
        assert not end.code, arguments
"""


@pytest.mark.slow
def test_the_module_test_line_and_recipe_of_the_page_work(tmp_path):
    """The test of the page passes; the line makes an option, a log line and an effective weight."""
    text = (ROOT / "docs" / "add_a_loss.md").read_text(encoding="utf-8")
    blocks = dict(
        re.findall(r"```(?:python|toml)\n# ([^\n]+)\n(.*?)```", text, re.DOTALL)
    )  # by the file in their first line
    assert set(blocks) == {
        LINE,
        "latentae/losses/smoothness.py",
        "tests/losses/test_smoothness.py",
        "smooth-tiny.toml",
    }
    line = blocks.pop(LINE)
    assert len(line.splitlines()) == 1
    shutil.copytree(ROOT / "latentae", tmp_path / "latentae", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "latentae" / "losses" / "options.py"
    before, opening, rest = table.read_text(encoding="utf-8").partition("REGULARIZERS: dict[str, str] = {\n")
    assert opening
    table.write_text(before + opening + line + rest, encoding="utf-8")
    for name, content in blocks.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "1 passed" in shown
    assert "smoothness" in done.stderr, "the run says what it weighs"
    assert "--loss.smoothness" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/smoothness" in line]
    assert steps
    assert all(line["loss/smoothness"] > 0 and line["gradient_norm/smoothness"] > 0 for line in steps)
    totals = [line["loss/l1"] + 0.1 * line["loss/smoothness"] + 1e-6 * line["loss/kl"] for line in steps]
    assert [line["loss/total"] for line in steps] == pytest.approx(totals, rel=1e-5)


def test_every_regularizer_is_an_option_and_explained():
    assert (
        "smoothness" not in LossOptions.model_fields
    )  # what the copy can do comes from the page, not from this checkout
    for name in REGULARIZERS:
        assert name in LossOptions.model_fields
        assert (regularizer(name).__doc__ or "").strip()
