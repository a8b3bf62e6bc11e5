"""Time each kernel beside plain torch, and write what was found to benchmarks/DEVICE/kernels.json.

    python tools/bench_kernels.py [--filter TEXT] [--repeats 30] [--batch 8] [--out FILE.json]
    python tools/bench_kernels.py --predict

On a CUDA GPU: bf16, caches cold, medians of CUDA-graph replays in turns; eager torch in both memory orders, torch.compile, and this
package; also the share of a copy's bandwidth that the two-pass bytes reach, the share of the floor, and peak memory. On a CPU: fp32 and
batch 1. `--predict` needs no GPU: it writes the bytes, the time they take at an assumed bandwidth, and registers from the compiler, to
benchmarks/predicted/kernels.json. Then `python tools/kernel_tables.py` brings the tables of kernels/README.md up to date.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from benchmarking import (
    ROOT,
    about,
    copy_bandwidth,
    cpu_seconds,
    cuda_seconds,
    default_device,
    folder_name,
    matmul_rate,
    peak_bytes,
    sets_beyond_cache,
    version,
    write_json,
)
from kernel_cases import Case, cases
from kernel_tables import FORMAT
from torch import Tensor


@dataclass(frozen=True)
class Rates:
    """What a device can do at best: bytes copied (read and written) and bf16 matrix arithmetic, a second."""

    bytes_per_second: float
    flops_per_second: float


ASSUMED = Rates(0.9 * 3.35e12, 0.7 * 989e12)
ASSUMPTION = (
    "an H100 SXM at 90 % of 3.35 TB/s and 70 % of 989 TFLOP/s (dense bf16): published peaks, not measurements"
)
WORST_ERROR = {
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
}  # relative, against plain torch in fp32: wrong results are not timed


class Trial:
    """One variant of a case, on inputs of its own."""

    def __init__(
        self, case: Case, inputs: Sequence[Tensor], function: Callable[..., Any], channels_last: bool
    ) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.case, self.function = case, function
        self.inputs = [t.clone(memory_format=layout) if t.ndim == 4 else t.clone() for t in inputs]
        for index in case.differentiable if case.backward else ():
            self.inputs[index].requires_grad_()
        self.gradients: list[Tensor] = []
        self.nbytes = sum(t.nbytes for t in self.inputs)

    def forward(self) -> list[Tensor]:
        """The outputs, always a list."""
        with torch.set_grad_enabled(self.case.backward):
            result = self.function(*self.inputs)
        return list(result) if isinstance(result, tuple) else [result]

    def timed(self) -> Callable[[], Sequence[Tensor]]:
        """What is timed: the forward pass, or the backward pass of a forward pass that runs now."""
        if not self.case.backward:
            return self.forward
        outputs = self.forward()
        self.gradients = self.gradients or [_gradient(output) for output in outputs]
        wanted = [self.inputs[index] for index in self.case.differentiable]
        return lambda: torch.autograd.grad(outputs, wanted, self.gradients, retain_graph=True)

    def whole(self) -> Sequence[Tensor]:
        """The forward pass and, where that is timed, the backward pass: what memory is measured of."""
        return self.timed()()


def _gradient(output: Tensor) -> Tensor:
    """The same numbers for every variant, in the memory order of its output."""
    values = torch.randn(
        output.shape, generator=torch.Generator(output.device).manual_seed(1), device=output.device
    )
    return torch.empty_like(output).copy_(values)


def variants(case: Case, compiled: bool) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Columns of the table: a function, and whether its inputs are channels_last."""
    columns = {"eager NCHW": (case.plain, False), "eager channels_last": (case.plain, True)}
    if compiled:
        columns["torch.compile"] = (torch.compile(case.plain, fullgraph=True, dynamic=False), True)
    return columns | {"ours": (case.ours, True)}


def check(case: Case, inputs: Sequence[Tensor]) -> float:
    """Largest relative error (2-norm) of our results against plain torch in fp32 on the same inputs; a wrong kernel is not timed."""
    got = Trial(case, inputs, case.ours, True).whole()
    expected = Trial(case, [t.float() for t in inputs], case.plain, True).whole()
    pairs = zip(got, expected, strict=True)
    error = max(
        float(torch.linalg.vector_norm(g.float() - e) / torch.linalg.vector_norm(e)) for g, e in pairs
    )
    worst = WORST_ERROR[inputs[0].dtype]
    if not error <= worst:
        raise SystemExit(
            f"{case.name}: relative error {error:.1e}, expected at most {worst:.0e}; nothing was timed"
        )
    return error


def measure_cpu(case: Case, inputs: Sequence[Tensor], repeats: int) -> dict[str, Any]:
    calls = {
        name: Trial(case, inputs, *column).timed() for name, column in variants(case, compiled=False).items()
    }
    return {"seconds": cpu_seconds(calls, repeats)}


def measure_cuda(case: Case, inputs: Sequence[Tensor], repeats: int, rates: Rates) -> dict[str, Any]:
    """Seconds and peak memory of each variant, and how near ours comes to the floor."""
    torch.compiler.reset()  # each case would be one more recompilation of the same function
    trials = {name: Trial(case, inputs, *column) for name, column in variants(case, compiled=True).items()}
    for trial in trials.values():
        trial.whole()  # compiled code, workspaces and output gradients exist before memory is counted
    peaks = {name: peak_bytes(trial.whole) for name, trial in trials.items()}
    sets = sets_beyond_cache(trials["ours"].nbytes, inputs[0].device)
    columns = {name: (trial.function, name != "eager NCHW") for name, trial in trials.items()}
    del trials
    calls = {
        name: [Trial(case, inputs, *column).timed() for _ in range(sets)] for name, column in columns.items()
    }
    seconds = cuda_seconds(calls, repeats)
    bandwidth = case.elements * case.bytes.two_pass / seconds["ours"]
    shares = {
        "of_copy": bandwidth / rates.bytes_per_second,
        "of_floor": floor_seconds(case, rates) / seconds["ours"],
    }
    return {"seconds": seconds, "peak_memory": peaks, "ours": {"tb_per_s": 1e-12 * bandwidth, **shares}}


def floor_seconds(case: Case, rates: Rates, passes: str = "one_pass") -> float:
    """The time the unavoidable bytes or the arithmetic take, whichever is longer."""
    nbytes = case.elements * getattr(case.bytes, passes)
    return max(nbytes / rates.bytes_per_second, case.elements * case.flops / rates.flops_per_second)


def describe(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The part of a row that is known before anything runs."""
    nbytes = {
        name: None if value is None else case.elements * value for name, value in asdict(case.bytes).items()
    }
    row = {
        "op": case.op,
        "mode": case.mode,
        "shape": list(case.shape),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return row | ({"bytes": nbytes, "flops": case.elements * case.flops} if dtype == torch.bfloat16 else {})


def predict(chosen: Sequence[Case], out: Path | None) -> None:
    """Bytes, the time they take at the assumed rates, and registers; nothing runs, so nothing is measured."""
    from latentae_kernels.aot import AotError, compile_all

    try:
        outcomes = compile_all(arches=(90,), filter="nhwc bf16")
    except AotError as error:
        raise SystemExit(f"bench_kernels: {error}") from error
    registers = {outcome.name: outcome.resources.registers for outcome in outcomes if outcome.resources}
    rows = []
    for case in chosen:
        predicted = {passes: floor_seconds(case, ASSUMED, passes) for passes in ("two_pass", "one_pass")}
        used = {
            name: registers[name]
            for kernel in case.kernels(case)
            for name in _nearest(registers, case, kernel)
        }
        rows.append(
            describe(case, torch.bfloat16)
            | {"predicted_seconds": predicted, "registers": used, "measured": None}
        )
        print(
            f"{case.name:56s} two passes {1e6 * predicted['two_pass']:7.1f} us, one {1e6 * predicted['one_pass']:7.1f} us"
        )
    header = {
        "format": FORMAT,
        "device": None,
        "assumption": ASSUMPTION,
        "rates": asdict(ASSUMED),
        "triton": version("triton"),
    }
    if out:
        write_json(out, header | {"architecture": "sm_90", "rows": rows})
        print(f"wrote {out}")


def _nearest(names: Iterable[str], case: Case, kernel: str) -> list[str]:
    """The compiled plan of a kernel whose channel count is nearest to the case's."""
    pattern = re.compile(re.escape(f"{kernel} nhwc bf16") + r" C=(\d+)\b")
    found = {
        name: abs(log2(int(match[1]) / case.shape[1])) for name in names if (match := pattern.match(name))
    }
    return [min(found, key=lambda name: found[name])] if found else []


def measure(chosen: Sequence[Case], device: torch.device, repeats: int, out: Path | None) -> None:
    """Measure case after case; the file is written after each, so that a run that is cut short leaves what it had."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    header: dict[str, Any] = {"format": FORMAT, **about(device), "repeats": repeats}
    rates = ASSUMED
    if cuda:
        rates = Rates(copy_bandwidth(device), matmul_rate(device))
        header["copy_tb_per_s"], header["matmul_tflop_per_s"] = (
            1e-12 * rates.bytes_per_second,
            1e-12 * rates.flops_per_second,
        )
        print(f"copy {header['copy_tb_per_s']:.2f} TB/s, matmul {header['matmul_tflop_per_s']:.0f} TFLOP/s")
    rows = []
    for case in chosen:
        torch.manual_seed(0)
        inputs = [t.to(device, dtype) for t in case.inputs(case.shape)]
        row = describe(case, dtype) | {"error": check(case, inputs)}
        row |= measure_cuda(case, inputs, repeats, rates) if cuda else measure_cpu(case, inputs, repeats)
        rows.append(row)
        print(_line(case, row), flush=True)
        if out:
            write_json(out, header | {"rows": rows})
        gc.collect()
    if out:
        print(f"wrote {out}")


def _line(case: Case, row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {1e3 * value:.3f}" for name, value in row["seconds"].items())
    ours = row.get("ours")
    end = (
        f"  {ours['tb_per_s']:.2f} TB/s, {ours['of_copy']:.0%} of a copy, {ours['of_floor']:.0%} of the floor"
        if ours
        else ""
    )
    return f"{case.name:56s} ms: {times}{end}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--predict", action="store_true", help="no measurement: bytes, floors and registers")
    parser.add_argument(
        "--filter",
        default="",
        metavar="TEXT",
        help="only cases with this text in their name; prints, writes nothing",
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each variant")
    parser.add_argument("--batch", type=int, help="images in a batch (default: 8, and 1 on a CPU)")
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        metavar="N",
        help="divide heights and widths by N: to try this program out",
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file to write instead of benchmarks/DEVICE/kernels.json"
    )
    options = parser.parse_args()
    device = default_device()
    batch = options.batch or (1 if device.type == "cpu" and not options.predict else None)
    chosen = [case.shrunk(batch, options.shrink) for case in cases() if options.filter in case.name]
    if not chosen:
        raise SystemExit(
            f"bench_kernels: no case has {options.filter!r} in its name; there are {', '.join(c.name for c in cases())}"
        )
    whole = not options.filter and options.shrink == 1
    folder = "predicted" if options.predict else folder_name(device)
    out = options.out or (ROOT / "benchmarks" / folder / "kernels.json" if whole else None)
    if options.predict:
        predict(chosen, out)
    elif device.type == "cpu":
        measure(chosen, device, options.repeats, out)
    else:
        functorch_config.donated_buffer = False  # a backward pass is replayed, so its graph is retained
        with torch.cuda.stream(
            torch.cuda.Stream()
        ):  # captures see one stream only; everything happens on this one
            measure(chosen, device, options.repeats, out)


if __name__ == "__main__":
    main()
