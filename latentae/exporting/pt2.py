"""AOTInductor packages: encoder and decoder as native code that torch loads without latentae."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from latentae.device import choose_device
from latentae.errors import MissingDependencyError, ModelError, first_line
from latentae.exporting.diffusers_folder import Exportable, ExportableConfig
from latentae.exporting.graphs import TOLERANCE, coder_graphs, largest_difference
from latentae.files import atomic_file
from latentae.measures.latents.half import trace_coders

__all__ = ["write_pt2"]


def write_pt2(model: Exportable, config: ExportableConfig, folder: Path, device: str = "cpu") -> None:
    """Write `folder`/pt2/encoder.pt2 and decoder.pt2, and compare their output with the model's.

    `torch._inductor.aoti_load_package(path)` gives a function of one fp32 tensor on `device`, with
    the inputs and outputs of `coder_graphs`. Batch, height and width are dynamic: any batch,
    latents of 2 or more pixels per side, image sides that are multiples of f.
    `get_metadata()["config"]` is the model's config.

    A package is native code for the processor family, operating system and torch version that built
    it. It does not check its input, which must be contiguous: channels_last gives wrong results. It
    contains its own sources, with paths of torch and Inductor's cache on the building machine.

    Args:
        model: it is copied, not changed.
        config: for the metadata.
        folder: parent of the folder `pt2`.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        RecipeError: no such device.
        MissingDependencyError: no C++ compiler.
        ModelError: the output of a package differs from the model's.
    """
    target = choose_device(device)
    graphs = coder_graphs(model, target)
    for name, program in trace_coders(model.config, graphs).items():
        with atomic_file(Path(folder) / "pt2" / f"{name}.pt2") as path:
            package = path.with_name(f"{path.name}.pt2")  # torch requires the suffix
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

    options = {"aot_inductor.metadata": {"config": json.dumps(config.diffusers_dict())}}
    try:
        with torch.no_grad():
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except InductorError as error:
        cause = error.inner_exception
        if not isinstance(cause, (CppCompileError, InvalidCxxCompiler)):
            raise
        raise MissingDependencyError(
            f"AOTInductor could not compile ({first_line(cause)}); install g++ or clang++ or set CXX to one"
        ) from error
    return aoti_load_package(str(path))
