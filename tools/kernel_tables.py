"""Write the tables of kernels/README.md from the JSON files under benchmarks/, or check that they
agree.

    python tools/kernel_tables.py [--check]

A line `<!-- table OP -->` begins the table of an op, `<!-- status -->` the sentence about what was
measured; each ends at `<!-- end -->`. Figures come from benchmarks/DEVICE/kernels.json
(tools/bench_kernels.py): one table per measured GPU, or the predicted bytes and times with an empty
column; then one per measured CPU. With `--check` nothing is written, and the exit status is 1 if
the README differs from the JSON files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1  # of tools/bench_kernels.py's JSON
BLOCK = re.compile(r"(<!-- (status|table \w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = (
    "**No kernel has been measured on a GPU yet.** The tables show the bytes that each kernel\n"
    "must move, the time they take at an assumed rate, and the compiler's register counts. The measured\n"
    "column is still empty."
)

Report = dict[str, Any]


def read(folder: Path) -> list[Report]:
    """The reports under benchmarks/ by folder; skips files of an older format."""
    found = []
    for file in sorted(folder.glob("*/kernels.json")):
        report = json.loads(file.read_text())
        if report.get("format") == FORMAT:
            found.append(report)
        else:
            message = f"kernel_tables: {file} has another format and is skipped; run tools/bench_kernels.py"
            print(message, file=sys.stderr)
    return found


def render(readme: str, reports: list[Report]) -> str:
    """The README with new tables."""
    if BLOCK.search(readme) is None:
        raise SystemExit("kernel_tables: the README has no marker such as <!-- table norm_act -->")
    return BLOCK.sub(lambda match: f"{match[1]}{_block(match[2], reports)}\n{match[3]}", readme)


def _block(marker: str, reports: list[Report]) -> str:
    gpus = [report for report in reports if report["device"] and "copy_tb_per_s" in report]
    cpus = [report for report in reports if report["device"] and "copy_tb_per_s" not in report]
    if marker == "status":
        return _status(gpus, [report for report in reports if not report["device"]])
    op = marker.removeprefix("table ")
    predicted = [_predicted_table(report, op) for report in reports if not report["device"]]
    tables = [_gpu_table(report, op) for report in gpus] or predicted
    tables += [_cpu_table(report, op) for report in cpus]
    return "\n\n".join(table for table in tables if table)


def _status(gpus: list[Report], predicted: list[Report]) -> str:
    if not gpus:
        assumed = (f"Assumed: {report['assumption']}. Triton {report['triton']}." for report in predicted)
        return "\n".join([NOT_MEASURED, *assumed])
    return "\n".join(
        f"Measured on {r['device']}: driver {r['driver']}, torch {r['torch']}, Triton {r['triton']}, "
        f"commit {r['commit']}; a copy reaches {r['copy_tb_per_s']:.2f} TB/s."
        for r in gpus
    )


def _rows(report: Report, op: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["op"] == op]


def _first_cells(row: dict[str, Any]) -> list[str]:
    return [row["mode"], "×".join(map(str, row["shape"]))]


def _predicted_table(report: Report, op: str) -> str:
    head = ["pass", "shape", "MB, two passes", "MB, one", "µs, two passes", "µs, one"]
    head += ["registers", "measured µs"]
    lines = []
    for row in _rows(report, op):
        sizes = [f"{1e-6 * row['bytes'][passes]:.1f}" for passes in ("two_pass", "one_pass")]
        times = [f"{1e6 * row['predicted_seconds'][passes]:.1f}" for passes in ("two_pass", "one_pass")]
        registers = ", ".join(map(str, row["registers"].values())) or "-"
        lines.append([*_first_cells(row), *sizes, *times, registers, ""])
    return _markdown(head, lines, f"bf16, channels_last, predicted; registers on {report['architecture']}")


def _gpu_table(report: Report, op: str) -> str:
    rows = _rows(report, op)
    columns = list(rows[0]["seconds"]) if rows else []
    head = ["pass", "shape", *(f"{c}, µs" for c in columns), "TB/s", "of a copy", "of the floor"]
    head += ["peak MB, eager", "peak MB, ours"]
    lines = []
    for row in rows:
        ours, peaks = row["ours"], row["peak_memory"]
        times = [f"{1e6 * row['seconds'][column]:.1f}" for column in columns]
        shares = [f"{ours['tb_per_s']:.2f}", f"{ours['of_copy']:.0%}", f"{ours['of_floor']:.0%}"]
        memory = [f"{1e-6 * peaks[column]:.0f}" for column in ("eager channels_last", "ours")]
        lines.append([*_first_cells(row), *times, *shares, *memory])
    return _markdown(head, lines, f"{report['device']}, bf16")


def _cpu_table(report: Report, op: str) -> str:
    rows = _rows(report, op)
    columns = list(rows[0]["seconds"]) if rows else []
    lines = []
    for row in rows:
        times = row["seconds"]
        ratio = times["ours"] / min(value for name, value in times.items() if name != "ours")
        milliseconds = [f"{1e3 * times[column]:.2f}" for column in columns]
        lines.append([*_first_cells(row), *milliseconds, f"{ratio:.2f}"])
    caption = f"{report['device']}, fp32, native operators; compare ratios, the machine is shared"
    return _markdown(["pass", "shape", *(f"{c}, ms" for c in columns), "ours / best eager"], lines, caption)


def _markdown(head: list[str], lines: list[list[str]], caption: str) -> str:
    if not lines:
        return ""
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join([f"{caption}:", "", *(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])])


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing; exit with 1 if README and JSON differ")
    add("--readme", type=Path, default=ROOT / "kernels" / "README.md", help="file with the markers")
    add("--benchmarks", type=Path, default=ROOT / "benchmarks", help="folder of DEVICE/kernels.json")
    options = parser.parse_args()
    before = options.readme.read_text()
    after = render(before, read(options.benchmarks))
    if before == after:
        return 0
    if options.check:
        message = f"{options.readme} differs from {options.benchmarks}; run python tools/kernel_tables.py"
        print(message, file=sys.stderr)
        return 1
    options.readme.write_text(after)
    print(f"wrote {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
