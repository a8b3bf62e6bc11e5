"""The benchmark of the data loader on a few images. Of its figures only those that can't be noise are checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--images", "24", "--shard-size", "4", "--batch", "2", "--repeats", "1"]
pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes in /proc")


def rows_by_measure(report: dict) -> dict[str, list[dict]]:
    return {
        name: [row for row in report["rows"] if row["measure"] == name] for name in {row["measure"] for row in report["rows"]}
    }


def test_every_stage_is_timed_on_the_same_pixels(run, tmp_path):
    code, output = run("bench_data", *SMALL, "--stages-only", "--out", tmp_path / "data.json")
    assert code == 0, output
    report = json.loads((tmp_path / "data.json").read_text())
    assert {"device", "commit", "command", "webdataset", "pillow"} <= report.keys()
    rows = rows_by_measure(report)
    assert {row["stage"] for row in rows["stage"]} == {"header", "decode", "crop and resize", "both"}
    assert rows["levels apart from PIL"][0]["largest"] <= 2


@pytest.mark.slow
def test_both_loaders_are_timed_and_their_bytes_counted(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "bench_data.py"), *SMALL, "--worlds", "1,2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "data.json")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = rows_by_measure(json.loads((tmp_path / "data.json").read_text()))
    loaders = {row["loader"]: row for row in rows["loader"]}
    assert {"webdataset + PIL", "latentae, Pillow only"} <= loaders.keys()
    assert all(row["images"] == 24 and row["images_per_cpu_second"] > 0 for row in loaders.values())
    for row in rows["read amplification"]:
        assert row["used_bytes"] > 24 * 5000
        assert row["amplification"] >= 1
