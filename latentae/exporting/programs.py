"""Encoder and decoder as programs: ONNX folders and AOTInductor packages."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from latentae.device import choose_device
from latentae.errors import MissingDependencyError, ModelError, first_line
from latentae.exporting.formats import Exportable, ExportableConfig
from latentae.files import atomic_file, write_json
from latentae.measures.latents.half import DECODER, ENCODER, trace_coders
from latentae.models.config import AutoencoderDCConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.pretrained import CONFIG

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["coder_graphs", "require_onnx", "write_onnx", "write_pt2"]

TOLERANCE = 1e-4  # of outputs, relative to the largest value
OPSET = 18  # the first with all operators needed, so that old runtimes read it
MODEL = "model.onnx"
LARGEST_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; 1 MiB is for the graph
FOLDERS = {ENCODER: "vae_encoder", DECODER: "vae_decoder"}
INPUTS = {ENCODER: "sample", DECODER: "latent_sample"}
OUTPUTS = {ENCODER: "latent_parameters", DECODER: "sample"}
_IMAGE_AXES, _LATENT_AXES = ("batch_size", "height", "width"), ("batch_size", "latent_height", "latent_width")


def coder_graphs(model: Exportable, device: str | torch.device = "cpu") -> dict[str, nn.Module]:
    """Encoder and decoder of a copy of `model`, in fp32, with one tensor in and one out.

    The encoder maps images [B, C, H, W] in [-1, 1] to the posterior's moments [B, 2z, H/f, W/f]:
    mean and log-variance, before any clamp. An AutoencoderDC's gives the latent or posterior mean
    [B, z, H/f, W/f]. The decoder maps raw latents [B, z, h, w] to images [B, C, f*h, f*w].
    """
    plain = copy.deepcopy(model).to(device, torch.float32).eval().requires_grad_(False)
    if isinstance(plain, AutoencoderDC):
        plain = plain.without_posterior()
        return {ENCODER: _chain(encoder=plain.encoder), DECODER: _chain(decoder=plain.decoder)}
    return {
        ENCODER: _chain(encoder=plain.encoder, quant_conv=plain.quant_conv),
        DECODER: _chain(post_quant_conv=plain.post_quant_conv, decoder=plain.decoder),
    }


def _chain(**modules: nn.Module | None) -> nn.Module:
    return nn.Sequential(OrderedDict({name: part for name, part in modules.items() if part is not None}))


def _check_output(
    what: str,
    model: Exportable,
    name: str,
    graph: nn.Module,
    other: Callable[[Tensor], Tensor],
    device: str | torch.device = "cpu",
) -> None:
    """Compare `other` with a graph of `coder_graphs`, on random inputs of two sizes not traced.

    The difference is relative to the largest value where that is above 1, since moments of an
    untrained model can be large. It is NaN if either output has one.

    Raises:
        ModelError: the largest difference is above `TOLERANCE`.
    """
    z, channels, f = model.config.latent_channels, model.config.in_channels, model.config.downsampling
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    for batch, height, width in ((1, 5, 2), (3, 2, 4)):
        shape = (batch, channels, f * height, f * width) if name == ENCODER else (batch, z, height, width)
        x = torch.randn(shape, generator=generator).to(device)
        with torch.no_grad():
            expected, found = graph(x), other(x)
        error = (found - expected).abs().amax() / expected.abs().amax().clamp(min=1)
        worst = torch.maximum(worst, error.cpu())
    if not worst.item() <= TOLERANCE:
        raise ModelError(
            f"{what} is off by {worst.item():.2g}, allowed is {TOLERANCE:g}; export another format"
        )


def require_onnx() -> None:
    """Check that onnx and onnxscript are installed.

    Raises:
        MissingDependencyError: one is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"ONNX files need {' and '.join(missing)}, not installed here; pip install 'latentae[export]'"
        )


def write_onnx(model: Exportable, config: ExportableConfig, folder: Path) -> None:
    """Write `folder`/vae_encoder and vae_decoder, each with model.onnx and config.json.

    Inputs and outputs are those of `coder_graphs`. The encoder maps `sample` to
    `latent_parameters`, or to `latent` for an AutoencoderDC; the decoder maps `latent_sample` to
    `sample`. Batch, height and width are dynamic: any batch, image sides that are multiples of f.
    If onnxruntime is installed, the output of both files is compared with the model's at sizes that
    were not traced.

    Args:
        model: it is copied, not changed.
        config: for config.json; pipelines read the scaling from it.
        folder: parent of both folders.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        ModelError: more than 2 GB of weights in a coder (external data is not supported), or the
            output of a file differs from the model's.
    """
    require_onnx()
    graphs = coder_graphs(model)
    for name, graph in graphs.items():
        _check_size(name, graph)
    for name, program in trace_coders(model.config, graphs).items():
        target = Path(folder) / FOLDERS[name]
        with atomic_file(target / MODEL) as path:
            path.write_bytes(_to_onnx(name, program, _output(name, config)).SerializeToString())
        write_json(target / CONFIG, config.diffusers_dict())
    if importlib.util.find_spec("onnxruntime") is not None:
        for name, graph in graphs.items():
            _check_file(model, name, graph, Path(folder) / FOLDERS[name] / MODEL)


def _output(name: str, config: ExportableConfig) -> str:
    return "latent" if name == ENCODER and isinstance(config, AutoencoderDCConfig) else OUTPUTS[name]


def _check_size(name: str, graph: nn.Module) -> None:
    size = sum(p.numel() * p.element_size() for p in graph.parameters())
    if size > LARGEST_BYTES:
        raise ModelError(
            f"the {name} has {size / 1e9:.3g} GB of weights, an ONNX file holds {LARGEST_BYTES / 1e9:.3g}; "
            "external data is not supported, use another format"
        )


def _to_onnx(name: str, program: ExportedProgram, output: str) -> ModelProto:
    """The program as an ONNX model with named axes and without paths of this machine."""
    converted = torch.onnx.export(
        program,
        (),
        input_names=[INPUTS[name]],
        output_names=[output],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert converted is not None  # it is None only if a file is written
    proto = converted.model_proto
    graph = proto.graph
    del graph.value_info[:]  # shapes in the tracer's symbols; runtimes infer them again
    for item in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]  # stack traces with paths
    values = (graph.input[0], graph.output[0])
    axes = (_IMAGE_AXES, _LATENT_AXES) if name == ENCODER else (_LATENT_AXES, _IMAGE_AXES)
    for value, names in zip(values, axes, strict=True):
        dims = value.type.tensor_type.shape.dim
        for index, axis in zip((0, 2, 3), names, strict=True):
            dims[index].dim_param = axis
    return proto


def _check_file(model: Exportable, name: str, graph: nn.Module, path: Path) -> None:
    """Compare the file's output in ONNX Runtime with the model's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUTS[name]: x.numpy()})[0])

    _check_output(f"{path}: ONNX Runtime's output", model, name, graph, run)


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
                _check_output(f"{name}.pt2", model, name, graphs[name], run, target)
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
