"""AOTInductor packages: encoder and decoder compiled to native code, which torch loads without the model's classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from latentae.device import choose_device
from latentae.errors import MissingDependencyError, ModelError, first_line
from latentae.exporting.graphs import coder_graphs, coder_programs, largest_difference
from latentae.exporting.kinds import Exportable, ExportableConfig
from latentae.files import atomic_file

__all__ = ["FOLDER", "write_pt2"]

FOLDER = "pt2"
TOLERANCE = 1e-4  # of the largest value, or absolute where that is below 1


def write_pt2(model: Exportable, config: ExportableConfig, folder: Path, device: str = "cpu") -> None:
    """Write `folder`/pt2/encoder.pt2 and decoder.pt2, and run what was written beside the model.

    `torch._inductor.aoti_load_package(path)` gives a function of one fp32 tensor on `device`. The encoder maps images [B, C, H, W] in
    [-1, 1] to moments [B, 2z, H/f, W/f] (mean and log-variance, neither clamped nor sampled; of an AutoencoderDC to its latents
    [B, z, H/f, W/f]), the decoder raw latents [B, z, h, w] to
    images [B, C, f*h, f*w]. Batch, height and width are dynamic: any batch from 1 on, latents of 2 and more pixels a side, sides that f
    divides. The metadata of a package (`get_metadata()`) has the model's config under "config".

    A package is native code: for the processor family, operating system and torch version it was built with. It does not check its
    input: that must be contiguous (`x.contiguous()`; in channels_last order the result is wrong). It also holds its own sources, with
    the paths of torch and of Inductor's cache on the machine that built it.

    Args:
        model: what to write; it is copied, not changed.
        config: goes into the metadata.
        folder: where the folder `pt2` goes.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        RecipeError: no such device.
        MissingDependencyError: no C++ compiler.
        ModelError: a package that does not compute what the model does.
    """
    target = choose_device(device)
    graphs = coder_graphs(model, target)
    for name, program in coder_programs(model, graphs).items():
        with atomic_file(Path(folder) / FOLDER / f"{name}.pt2") as path:
            package = path.with_name(f"{path.name}.pt2")  # torch wants the ending
            try:
                run = _build(program, package, config)
                error = largest_difference(model, name, graphs[name], run, target)
                if not error <= TOLERANCE:
                    raise ModelError(
                        f"{name}.pt2 is off by {error:.2g}, allowed is {TOLERANCE:g}; export another format"
                    )
                package.replace(path)
            finally:
                package.unlink(missing_ok=True)


def _build(program: ExportedProgram, path: Path, config: ExportableConfig) -> Callable[[Tensor], Tensor]:
    """Compile, write and load."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    metadata = {"config": json.dumps(config.diffusers_dict())}
    try:
        with torch.no_grad():
            aoti_compile_and_package(
                program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata}
            )
    except InductorError as error:
        cause = error.inner_exception
        if not isinstance(cause, (CppCompileError, InvalidCxxCompiler)):
            raise
        raise MissingDependencyError(
            f"AOTInductor could not compile ({first_line(cause)}); install g++ or clang++ or set CXX to one"
        ) from error
    return aoti_load_package(str(path))
