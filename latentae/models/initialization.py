"""Where the weights of a training start: from a file, or as a nearly linear codec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentae.errors import ModelError, some
from latentae.file_names import DISCRIMINATOR
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.blocks import Attention, ResnetBlock
from latentae.models.config import AutoencoderConfig, build
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.dc.blocks import Attention as LinearAttention
from latentae.models.dc.blocks import Down, GatedConv, ResidualBlock, Up
from latentae.models.ldm import discriminator_from_ldm, ldm_prefix
from latentae.models.pretrained import TRAINING, ModelSource, resolve_model
from latentae.models.state_dicts import fitting_state
from latentae.models.weight_files import read_tensors

__all__ = [
    "InitialWeights",
    "load_discriminator",
    "load_initial",
    "set_deterministic",
    "set_initial_logvar",
    "start_linear",
]


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start a training with."""

    config: AutoencoderConfig
    state: dict[str, Tensor]
    """The autoencoder's state dict, in fp32."""
    discriminator: dict[str, Tensor] | None
    """The state dict of a discriminator in the same files, for `load_discriminator`."""
    fingerprint: str
    """Equal fingerprints give equal weights."""


def load_initial(path: str | Path) -> InitialWeights:
    """Read the EMA weights of a MODEL (see `resolve_model`).

    The discriminator is that of the run, of the export's `training/`, or of the LDM file, if there
    is one.

    Raises:
        ModelError: no such model, or one that is damaged, incomplete or of another family.
    """
    source = resolve_model(path)
    tensors = read_tensors(source.weights_file)
    file = _discriminator_file(source)
    discriminator = read_tensors(file) if file is not None and file.is_file() else None
    if discriminator is None and ldm_prefix(tensors) is not None:
        discriminator = discriminator_from_ldm(tensors, source.weights_file)
    with torch.device("meta"):
        model = build(source.config)
    state = _wide(fitting_state(model, tensors, source.weights_file))
    return InitialWeights(source.config, state, discriminator and _wide(discriminator), source.fingerprint)


def _discriminator_file(source: ModelSource) -> Path | None:
    """The discriminator of a model's training: in its checkpoint, or next to an export."""
    folder = source.weights_file.parent
    if source.kind == "file":
        return None
    return (folder / TRAINING if source.kind == "folder" else folder) / DISCRIMINATOR


def _wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float().contiguous() for key, value in state.items()}


def load_discriminator(module: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Copy `state` into a discriminator if keys and shapes are equal.

    Returns:
        None, or in words what does not fit.
    """
    expected = module.state_dict()
    if missing := [key for key in expected if key not in state]:
        return f"it lacks {some(missing)}"
    if unknown := [key for key in state if key not in expected]:
        return f"it has unknown {some(unknown)}"
    for key, value in expected.items():
        if state[key].shape != value.shape:
            return f"its {key} has shape {tuple(state[key].shape)}, this discriminator's {tuple(value.shape)}"
    module.load_state_dict(state)
    return None


@torch.no_grad()
def start_linear(model: Autoencoder) -> None:
    """Start as a nearly linear codec: branches add zero, convolutions keep their input's variance.

    PyTorch's own start cuts the variance to a third at each convolution, and the branches add noise
    to the rest. With few steps, most of them are spent on undoing that. Branches start at zero
    (Goyal et al. 2017, section 5.1) and weights have variance 1/fan-in (He et al. 2015, eq. 10,
    with gain 1 since the trunk has no activation). The branches of an AutoencoderDC end in a
    normalization, whose weight and bias start at zero. Its convolutions with a shortcut share the
    variance with it.

    Raises:
        ModelError: a model without such branches.
    """
    if not isinstance(model, AutoencoderKL | AutoencoderDC):
        raise ModelError(f"a {type(model).__name__} has no linear start; set initialization = 'torch'")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if (last := _last_of_branch(module)) is not None:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        if isinstance(module, Down | Up) and module.shortcut:
            module.conv.weight.mul_(0.5**0.5)
    if isinstance(model, AutoencoderDC) and model.encoder.conv_out_logvar is not None:
        nn.init.zeros_(model.encoder.conv_out_logvar.weight)


def _last_of_branch(module: nn.Module) -> nn.Module | None:
    """The last layer of a residual branch; None for other modules."""
    if isinstance(module, ResnetBlock):
        return module.conv2
    if isinstance(module, Attention):
        return module.to_out[0]
    if isinstance(module, LinearAttention):
        return module.norm_out
    return module.norm if isinstance(module, GatedConv | ResidualBlock) else None


@torch.no_grad()
def set_initial_logvar(model: Autoencoder, logvar: float) -> None:
    """Add `logvar` to the posterior's log-variance: training starts with more or less latent noise.

    Raises:
        ModelError: a model without a posterior, and `logvar` is not 0.
    """
    conv, first = _logvar_layer(model)
    if conv is not None and conv.bias is not None:
        conv.bias[first:] += logvar
    elif logvar:
        raise ModelError(
            f"initial log-variance is {logvar:g}, but a {type(model).__name__} without a posterior has "
            "none; set it to 0"
        )


@torch.no_grad()
def set_deterministic(model: Autoencoder) -> None:
    """Set the posterior's log-variance to its minimum, so that a sample equals the mean.

    Without a KL term and without sampling these weights get no gradient, so they stay. Models
    without a posterior are not changed.
    """
    conv, first = _logvar_layer(model)
    if conv is not None and conv.bias is not None:
        conv.weight[first:] = 0.0
        conv.bias[first:] = DiagonalGaussian.SMALLEST_LOGVAR


def _logvar_layer(model: Autoencoder) -> tuple[nn.Conv2d | None, int]:
    """The convolution that computes the log-variance, and its first output channel of it."""
    if isinstance(model, AutoencoderKL):
        conv = model.encoder.conv_out if model.quant_conv is None else model.quant_conv
        return conv, model.config.latent_channels
    return (model.encoder.conv_out_logvar if isinstance(model, AutoencoderDC) else None), 0
