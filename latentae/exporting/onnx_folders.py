"""ONNX encoder and decoder, in the layout of optimum and diffusers' ONNX pipelines."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from latentae.errors import MissingDependencyError, ModelError
from latentae.exporting.diffusers_folder import Exportable, ExportableConfig
from latentae.exporting.graphs import TOLERANCE, coder_graphs, largest_difference
from latentae.files import atomic_file, write_json
from latentae.measures.latents.half import DECODER, ENCODER, trace_coders
from latentae.models.config import AutoencoderDCConfig
from latentae.models.pretrained import CONFIG

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["require_onnx", "write_onnx"]

OPSET = 18  # the first with all operators needed, so that old runtimes read it
MODEL = "model.onnx"
LARGEST_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; 1 MiB is for the graph
FOLDERS = {ENCODER: "vae_encoder", DECODER: "vae_decoder"}
INPUTS = {ENCODER: "sample", DECODER: "latent_sample"}
OUTPUTS = {ENCODER: "latent_parameters", DECODER: "sample"}
_IMAGE_AXES, _LATENT_AXES = ("batch_size", "height", "width"), ("batch_size", "latent_height", "latent_width")


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

    error = largest_difference(model, name, graph, run)
    if not error <= TOLERANCE:
        raise ModelError(
            f"{path}: ONNX Runtime's output is off by {error:.2g}, allowed is {TOLERANCE:g}; "
            "export another format"
        )
