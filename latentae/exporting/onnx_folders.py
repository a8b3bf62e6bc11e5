"""ONNX encoder and decoder in the folders, and with the tensor names, that optimum and diffusers' ONNX pipelines look for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram

from latentae.errors import MissingDependencyError, ModelError
from latentae.exporting.graphs import DECODER, ENCODER, coder_graphs, coder_programs, largest_difference
from latentae.exporting.kinds import Exportable, ExportableConfig
from latentae.files import atomic_file, write_json
from latentae.models.config import AutoencoderKLConfig
from latentae.models.pretrained import CONFIG

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ONNX_FOLDERS", "OPSET", "require_onnx", "write_onnx"]

OPSET = 18  # the first with everything that is needed, so the oldest runtimes read it
MODEL = "model.onnx"
LARGEST_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; a MiB is left for the graph
TOLERANCE = 1e-4  # of the largest value, or absolute where that is below 1


class Names(NamedTuple):
    """What optimum calls a coder's folder, input and output."""

    folder: str
    input: str
    output: str


ONNX_FOLDERS = {
    ENCODER: Names("vae_encoder", "sample", "latent_parameters"),
    DECODER: Names("vae_decoder", "latent_sample", "sample"),
}
DC_FOLDERS = {**ONNX_FOLDERS, ENCODER: Names("vae_encoder", "sample", "latent")}
_IMAGE_AXES, _LATENT_AXES = ("batch_size", "height", "width"), ("batch_size", "latent_height", "latent_width")


def require_onnx() -> None:
    """Say which packages are missing, before any work.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"ONNX files need {' and '.join(missing)}, not installed here; pip install 'latentae[export]'"
        )


def write_onnx(model: Exportable, config: ExportableConfig, folder: Path) -> None:
    """Write `folder`/vae_encoder and `folder`/vae_decoder, each with model.onnx (fp32, opset 18) and a config.json.

    The encoder maps `sample` [B, C, H, W] in [-1, 1] to `latent_parameters` [B, 2z, H/f, W/f], the posterior's moments after quant_conv:
    mean and log-variance, neither clamped nor sampled; that of an AutoencoderDC to `latent` [B, z, H/f, W/f]. The decoder maps raw
    `latent_sample` [B, z, h, w] to `sample` [B, C, f*h, f*w]. Batch, height and width are dynamic: any batch from 1 on, any sides that f
    divides. The files hold standard operators only. Where onnxruntime is installed both are run at a size unseen at export and compared
    with the model.

    Args:
        model: what to write; it is copied, not changed.
        config: written to config.json; what a pipeline reads of scaling.
        folder: where the two folders go.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
        ModelError: weights of more than 2 GB in a coder (files with external data are not supported), or a file that does not compute
            what the model does.
    """
    require_onnx()
    graphs = coder_graphs(model)
    for name, graph in graphs.items():
        _check_size(name, graph)
    for name, program in coder_programs(model, graphs).items():
        target = Path(folder) / ONNX_FOLDERS[name].folder
        with atomic_file(target / MODEL) as path:
            path.write_bytes(_to_onnx(name, program, _folders(config)[name]).SerializeToString())
        write_json(target / CONFIG, config.diffusers_dict())
    if importlib.util.find_spec("onnxruntime") is not None:
        _check_files(model, graphs, Path(folder))


def _check_size(name: str, graph: nn.Module) -> None:
    size = sum(p.numel() * p.element_size() for p in graph.parameters())
    if size > LARGEST_BYTES:
        raise ModelError(
            f"the {name} has {size / 1e9:.3g} GB of weights, an ONNX file holds less than {LARGEST_BYTES / 1e9:.3g}; "
            "external data is not supported, so take another format"
        )


def _folders(config: ExportableConfig) -> dict[str, Names]:
    return ONNX_FOLDERS if isinstance(config, AutoencoderKLConfig) else DC_FOLDERS


def _to_onnx(name: str, program: ExportedProgram, names: Names) -> ModelProto:
    """The program as an ONNX model that names its axes and says nothing about the machine it was made on."""
    converted = torch.onnx.export(
        program,
        (),
        input_names=[names.input],
        output_names=[names.output],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert converted is not None  # as it is where no file is asked for
    proto = converted.model_proto
    del proto.graph.value_info[:]  # shapes in the tracer's symbols; runtimes infer them again
    for item in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        del item.metadata_props[:]  # stack traces with the paths of this machine
    image, latent = (proto.graph.input[0], proto.graph.output[0])[:: 1 if name == ENCODER else -1]
    for value, axes in ((image, _IMAGE_AXES), (latent, _LATENT_AXES)):
        dims = value.type.tensor_type.shape.dim
        for index, axis in zip((0, 2, 3), axes, strict=True):
            dims[index].dim_param = axis
    return proto


def _check_files(model: Exportable, graphs: dict[str, nn.Module], folder: Path) -> None:
    """Run both files in ONNX Runtime beside the model."""
    import onnxruntime

    for name, names in _folders(model.config).items():
        path = folder / names.folder / MODEL
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(x: torch.Tensor, session: Any = session, names: Names = names) -> torch.Tensor:
            return torch.from_numpy(session.run([names.output], {names.input: x.numpy()})[0])

        error = largest_difference(model, name, graphs[name], run)
        if not error <= TOLERANCE:
            raise ModelError(
                f"{path}: ONNX Runtime's output is off by {error:.2g}, allowed is {TOLERANCE:g}; export another format"
            )
