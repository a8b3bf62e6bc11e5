"""Time each kernel and plain torch, and write benchmarks/DEVICE/kernels.json.

    python tools/bench_kernels.py [--filter TEXT] [--repeats 30] [--batch 8] [--out FILE.json]
    python tools/bench_kernels.py --predict

On a CUDA GPU: bf16, cold caches, medians of CUDA-graph replays in turns; eager torch in both memory
formats, torch.compile, and this package; also peak memory and the shares of a copy's bandwidth and
of the floor. On a
CPU: fp32 and batch 1. `--predict` needs no GPU: it writes bytes, the time they take at an assumed
bandwidth, and the compiler's register counts to benchmarks/predicted/kernels.json. `python
tools/kernel_tables.py` then updates the tables of kernels/README.md.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
from benchmarking import (
    ROOT,
    about,
    command_line,
    copy_bandwidth,
    cpu_seconds,
    cuda_seconds,
    default_device,
    matmul_rate,
    peak_bytes,
    result_file,
    sets_beyond_cache,
    version,
    write_json,
)
from kernel_cases import Case, cases
from kernel_tables import FORMAT
from torch import Tensor


class Rates(NamedTuple):
    """A device's rates per second: bytes copied (read and written), bf16 matrix arithmetic."""

    bytes_per_second: float
    flops_per_second: float


ASSUMED = Rates(0.9 * 3.35e12, 0.7 * 989e12)
ASSUMPTION = (
    "an H100 SXM at 90 % of 3.35 TB/s and 70 % of 989 TFLOP/s (dense bf16): published peaks, not measurements"
)
# relative to plain torch in fp32; a wrong result is not timed
WORST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Trial:
    """One variant of a case, with its own inputs."""

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
        """The timed call: the forward pass, or the backward pass after a forward pass."""
        if not self.case.backward:
            return self.forward
        outputs = self.forward()
        self.gradients = self.gradients or [_gradient(output) for output in outputs]
        wanted = [self.inputs[index] for index in self.case.differentiable]
        return lambda: torch.autograd.grad(outputs, wanted, self.gradients, retain_graph=True)

    def complete(self) -> Sequence[Tensor]:
        """The forward pass and, if it is timed, the backward pass; its memory is measured."""
        return self.timed()()


def _gradient(output: Tensor) -> Tensor:
    """The same numbers for every variant, in the memory format of its output."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    return torch.empty_like(output).copy_(values)


def variants(case: Case, compiled: bool) -> dict[str, tuple[Callable[..., Any], bool]]:
    """Columns of the table: a function, and whether its inputs are channels_last."""
    columns = {"eager NCHW": (case.plain, False), "eager channels_last": (case.plain, True)}
    if compiled:
        columns["torch.compile"] = (torch.compile(case.plain, fullgraph=True, dynamic=False), True)
    return columns | {"ours": (case.ours, True)}


def check(case: Case, inputs: Sequence[Tensor]) -> float:
    """Largest relative error (2-norm) against plain torch in fp32; stops if it is too large."""
    got = Trial(case, inputs, case.ours, True).complete()
    expected = Trial(case, [t.float() for t in inputs], case.plain, True).complete()
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
    """Seconds and peak memory of each variant, and our distance from the floor."""
    torch.compiler.reset()  # each case would be one more recompilation of the same function
    trials = {name: Trial(case, inputs, *column) for name, column in variants(case, compiled=True).items()}
    for trial in trials.values():
        trial.complete()  # compiled code, workspaces and output gradients exist before memory is counted
    peaks = {name: peak_bytes(trial.complete) for name, trial in trials.items()}
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
    """The longer of the times that the unavoidable bytes and the arithmetic take."""
    nbytes = case.elements * getattr(case.bytes, passes)
    return max(nbytes / rates.bytes_per_second, case.elements * case.flops / rates.flops_per_second)


def describe(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The part of a row that is known before anything runs."""
    row = {"op": case.op, "mode": case.mode, "shape": list(case.shape)}
    row["dtype"] = str(dtype).removeprefix("torch.")
    if dtype == torch.bfloat16:
        sizes = asdict(case.bytes).items()
        row["bytes"] = {name: value and case.elements * value for name, value in sizes}
        row["flops"] = case.elements * case.flops
    return row


def predict(chosen: Sequence[Case], out: Path | None) -> None:
    """Write bytes, the time they take at the assumed rates, and registers; no kernel runs."""
    from latentae_kernels.aot import AotError, compile_all

    try:
        outcomes = compile_all(arches=(90,), filter="nhwc bf16")
    except AotError as error:
        raise SystemExit(f"bench_kernels: {error}") from error
    registers = {outcome.name: outcome.resources.registers for outcome in outcomes if outcome.resources}
    rows = []
    for case in chosen:
        predicted = {passes: floor_seconds(case, ASSUMED, passes) for passes in ("two_pass", "one_pass")}
        names = [name for kernel in case.kernels(case) for name in _nearest(registers, case, kernel)]
        row = {"predicted_seconds": predicted, "registers": {name: registers[name] for name in names}}
        rows.append(describe(case, torch.bfloat16) | row | {"measured": None})
        two, one = (1e6 * seconds for seconds in predicted.values())
        print(f"{case.name:56s} two passes {two:7.1f} us, one {one:7.1f} us")
    header = {"format": FORMAT, "device": None, "assumption": ASSUMPTION, "rates": ASSUMED._asdict()}
    if out:
        header |= {"triton": version("triton"), "architecture": "sm_90", "rows": rows}
        write_json(out, header)
        print(f"wrote {out}")


def _nearest(names: Iterable[str], case: Case, kernel: str) -> list[str]:
    """The compiled plan of a kernel whose channel count is nearest to the case's."""
    pattern = re.compile(re.escape(f"{kernel} nhwc bf16") + r" C=(\d+)\b")
    found = {
        name: abs(log2(int(match[1]) / case.shape[1])) for name in names if (match := pattern.match(name))
    }
    return [min(found, key=lambda name: found[name])] if found else []


def measure(chosen: Sequence[Case], device: torch.device, repeats: int, out: Path | None) -> None:
    """Measure the cases and write the file after each, so that nothing is lost."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    header: dict[str, Any] = {"format": FORMAT, **about(device), "repeats": repeats}
    rates = ASSUMED
    if cuda:
        rates = Rates(copy_bandwidth(device), matmul_rate(device))
        header["copy_tb_per_s"] = 1e-12 * rates.bytes_per_second
        header["matmul_tflop_per_s"] = 1e-12 * rates.flops_per_second
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
    ours, end = row.get("ours"), ""
    if ours:
        shares = f"{ours['of_copy']:.0%} of a copy, {ours['of_floor']:.0%} of the floor"
        end = f"  {ours['tb_per_s']:.2f} TB/s, {shares}"
    return f"{case.name:56s} ms: {times}{end}"


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--predict", action="store_true", help="write bytes, floors and registers without measuring")
    add(
        "--filter", default="", metavar="TEXT", help="only cases with this text in their name; writes no file"
    )
    add("--repeats", type=int, default=30, help="timed runs of each variant")
    add("--batch", type=int, help="images per batch (default: 8, and 1 on a CPU)")
    add("--shrink", type=int, default=1, metavar="N", help="divide heights and widths by N, for a trial run")
    options = parser.parse_args()
    device = default_device()
    batch = options.batch or (1 if device.type == "cpu" and not options.predict else None)
    chosen = [case.shrunk(batch, options.shrink) for case in cases() if options.filter in case.name]
    if not chosen:
        names = ", ".join(case.name for case in cases())
        raise SystemExit(f"bench_kernels: no case has {options.filter!r} in its name; use one of {names}")
    out = options.out
    if not out and not options.filter and options.shrink == 1:
        file = ROOT / "benchmarks" / "predicted" / "kernels.json"
        out = file if options.predict else result_file(device, "kernels")
    if options.predict:
        predict(chosen, out)
    elif device.type == "cpu":
        measure(chosen, device, options.repeats, out)
    else:
        functorch_config.donated_buffer = False  # a backward pass is replayed, so its graph is retained
        with torch.cuda.stream(torch.cuda.Stream()):  # captures see one stream only
            measure(chosen, device, options.repeats, out)


if __name__ == "__main__":
    main()
