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

ROOT = Path(__file__).resolve().parents[2]
LINE = "latentae/losses/regularizers.py, in REGULARIZERS"


def blocks():
    """What the page's blocks are for -> their text: the first line of a block names its file."""
    text = (ROOT / "docs" / "add_a_loss.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```(?:python|toml)\n# ([^\n]+)\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the regularizer of the page, and its environment."""
    home = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "latentae", home / "latentae", ignore=shutil.ignore_patterns("__pycache__"))
    found = blocks()
    assert set(found) == {LINE, "latentae/losses/smoothness.py", "tests/losses/test_smoothness.py", "smooth-tiny.toml"}
    line = found.pop(LINE)
    assert len(line.splitlines()) == 1
    table = home / "latentae" / "losses" / "regularizers.py"
    before, opening, rest = table.read_text(encoding="utf-8").partition("REGULARIZERS: dict[str, str] = {\n")
    assert opening
    table.write_text(before + opening + line + rest, encoding="utf-8")
    for name, text in found.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    return home


def run(copy, *arguments):
    path = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_the_test_of_the_page_passes(copy):
    assert "1 passed" in run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/losses/test_smoothness.py")


def test_the_line_makes_an_option_a_log_line_and_an_effective_weight(copy):
    shown = run(copy, "-m", "latentae", "train", "smooth-tiny.toml", "--output", "run", "--log.metrics-every-images", "4")
    assert "smoothness" in shown, "the run says what it weighs"
    assert "--loss.smoothness" in run(copy, "-m", "latentae", "train", "--help")
    lines = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/smoothness" in line]
    assert steps
    assert all(line["loss/smoothness"] > 0 and line["gradient_norm/smoothness"] > 0 for line in steps)
    totals = [line["loss/l1"] + 0.1 * line["loss/smoothness"] + 1e-6 * line["loss/kl"] for line in steps]
    assert [line["loss/total"] for line in steps] == pytest.approx(totals, rel=1e-5)


def test_here_it_is_no_option():
    """What the copy can do comes from the page, not from this checkout."""
    from latentae.losses.options import LossOptions
    from latentae.losses.regularizers import REGULARIZERS, regularizer

    assert "smoothness" not in LossOptions.model_fields
    for name in REGULARIZERS:
        assert name in LossOptions.model_fields
        assert (regularizer(name).__doc__ or "").strip()
