"""kernels/README.md says what the JSON files under benchmarks/ say, and measured figures take the
place of predicted ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "# Kernels\n<!-- status -->\nold\n<!-- end -->\ntext\n<!-- table norm_act -->\n<!-- end -->\nmore\n"
ROW = {"op": "norm_act", "mode": "forward", "shape": [8, 128, 256, 256]}
PREDICTED = {
    "format": 1,
    "device": None,
    "assumption": "a fast GPU",
    "triton": "3.9.0",
    "architecture": "sm_90",
    "rows": [
        ROW
        | {
            "bytes": {"two_pass": 402653184, "one_pass": 268435456},
            "predicted_seconds": {"two_pass": 1.335e-4, "one_pass": 8.9e-5},
            "registers": {"norm_act/a": 116, "norm_act/b": 56},
            "measured": None,
        }
    ],
}
GPU = {
    "format": 1,
    "device": "Some GPU",
    "driver": "1.2",
    "torch": "2.15",
    "triton": "3.9.0",
    "commit": "abc",
    "copy_tb_per_s": 3.0,
    "rows": [
        ROW
        | {
            "seconds": {
                "eager NCHW": 5e-4,
                "eager channels_last": 6e-4,
                "torch.compile": 4e-4,
                "ours": 1.5e-4,
            },
            "peak_memory": {
                "eager NCHW": 3e8,
                "eager channels_last": 2.9e8,
                "torch.compile": 2e8,
                "ours": 1.35e8,
            },
            "ours": {"tb_per_s": 2.68, "of_copy": 0.89, "of_floor": 0.6},
        }
    ],
}
CPU = {
    "format": 1,
    "device": "cpu, 2 threads",
    "rows": [ROW | {"seconds": {"eager NCHW": 0.02, "eager channels_last": 0.03, "ours": 0.01}}],
}


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "README.md").write_text(MARKERS)
    return tmp_path / "README.md"


@pytest.fixture
def update(run, readme) -> Callable[..., tuple[object, str]]:
    def call(*arguments: str, **reports: dict) -> tuple[object, str]:
        for folder, report in reports.items():
            file = readme.parent / "benchmarks" / folder / "kernels.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report))
        return run(
            "kernel_tables", "--readme", readme, "--benchmarks", readme.parent / "benchmarks", *arguments
        )

    return call


def test_the_readme_of_this_repository_agrees_with_its_json_files(run):
    code, output = run("kernel_tables", "--check")
    assert code == 0, output


def test_every_op_that_is_benchmarked_has_a_table_in_the_readme():
    text = (ROOT / "kernels" / "README.md").read_text()
    report = json.loads((ROOT / "benchmarks" / "predicted" / "kernels.json").read_text())
    for op in {row["op"] for row in report["rows"]}:
        assert f"<!-- table {op} -->" in text


def test_without_a_measurement_the_column_is_empty_and_the_readme_says_so(update, readme):
    assert update(predicted=PREDICTED)[0] == 0
    text = readme.read_text()
    assert "No kernel has been measured on a GPU yet" in text
    assert "a fast GPU" in text
    assert "| forward | 8×128×256×256 | 402.7 | 268.4 | 133.5 | 89.0 | 116, 56 |  |" in text
    assert "old" not in text
    assert text.startswith("# Kernels\n")
    assert text.endswith("<!-- end -->\nmore\n")


def test_measured_figures_replace_predicted_ones(update, readme):
    update(predicted=PREDICTED)
    update(some_gpu=GPU, cpu=CPU)
    text = readme.read_text()
    assert "No kernel has been measured" not in text
    assert "Measured on Some GPU" in text
    assert (
        "| forward | 8×128×256×256 | 500.0 | 600.0 | 400.0 | 150.0 | 2.68 | 89% | 60% | 290 | 135 |" in text
    )
    assert "116, 56" not in text
    assert "| forward | 8×128×256×256 | 20.00 | 30.00 | 10.00 | 0.50 |" in text


def test_check_tells_a_stale_readme_and_writes_nothing(update, readme):
    update(predicted=PREDICTED)
    before = readme.read_text()
    assert update("--check")[0] == 0
    code, output = update("--check", some_gpu=GPU)
    assert code == 1
    assert "run python tools/kernel_tables.py" in output
    assert readme.read_text() == before


def test_a_file_of_another_format_is_named_and_left_out(update, readme):
    code, output = update(predicted=PREDICTED, old={"device": "cpu", "rows": []})
    assert code == 0
    assert "old/kernels.json has another format" in output
    assert "No kernel has been measured" in readme.read_text()
