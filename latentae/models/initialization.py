"""Where the weights of an autoencoder start."""

from __future__ import annotations

import torch
from torch import nn

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.blocks import Attention, ResnetBlock
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.dc.blocks import Attention as LinearAttention
from latentae.models.dc.blocks import Down, FrozenBatchNorm, GatedConv, ResidualBlock, RMSNorm, Up

__all__ = ["set_deterministic", "set_initial_logvar", "start_linear"]


@torch.no_grad()
def start_linear(model: Autoencoder) -> None:
    """Begin as a nearly linear codec: every residual branch adds zero, every convolution keeps the variance of its input.

    PyTorch's own start shrinks what passes a convolution to a third of its variance, and the branches add noise to what is left;
    with few steps to spend, undoing that costs most of them. Branches at zero: Goyal et al. 2017, section 5.1; variance 1/fan-in:
    He et al. 2015, eq. 10, with gain 1 since the trunk has no activation. Of an AutoencoderDC the branches end in a normalization, whose
    weight and bias are zero; its convolutions beside a shortcut share the variance with it.

    Raises:
        ModelError: another kind of model, which has no such branches.
    """
    if not isinstance(model, AutoencoderKL | AutoencoderDC):
        raise ModelError(
            f"a {type(model).__name__} has no linear start of its own; set initialization = 'torch'"
        )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        for parameter in _last_of_branch(module):
            nn.init.zeros_(parameter)
        if isinstance(module, Down | Up) and module.shortcut:
            module.conv.weight.mul_(0.5**0.5)
    if isinstance(model, AutoencoderDC) and model.encoder.conv_out_logvar is not None:
        nn.init.zeros_(model.encoder.conv_out_logvar.weight)


def _last_of_branch(module: nn.Module) -> list[nn.Parameter]:
    """What a residual branch ends in, where `module` is one."""
    if isinstance(module, ResnetBlock):
        return list(module.conv2.parameters())
    if isinstance(module, Attention):
        return list(module.to_out[0].parameters())
    last = module.norm_out if isinstance(module, LinearAttention) else getattr(module, "norm", None)
    if isinstance(module, LinearAttention | GatedConv | ResidualBlock):
        assert isinstance(last, RMSNorm | FrozenBatchNorm)
        return list(last.parameters())
    return []


@torch.no_grad()
def set_initial_logvar(model: Autoencoder, logvar: float) -> None:
    """Shift the log-variance of the posterior by `logvar`, so that training begins with more or less noise on the latent.

    Raises:
        ModelError: a model without a posterior, and a shift that is not 0.
    """
    if isinstance(model, AutoencoderKL):
        last = model.quant_conv if model.quant_conv is not None else model.encoder.conv_out
        bias, z = last.bias, model.config.latent_channels
    else:
        last = model.encoder.conv_out_logvar if isinstance(model, AutoencoderDC) else None
        bias, z = None if last is None else last.bias, 0
    if bias is not None:
        bias[z:] += logvar
    elif logvar:
        raise ModelError(
            f"a {type(model).__name__} without a posterior has no log-variance to begin at {logvar:g}; set it to 0"
        )


@torch.no_grad()
def set_deterministic(model: Autoencoder) -> None:
    """Give the posterior the smallest log-variance there is, -30, for every image: a sample is the mean, for everyone who loads it.

    Without a KL term and without sampling these weights get no gradient, so they stay. Models without a posterior are so already.
    """
    if isinstance(model, AutoencoderKL):
        last, z = (
            model.quant_conv if model.quant_conv is not None else model.encoder.conv_out,
            model.config.latent_channels,
        )
    elif isinstance(model, AutoencoderDC) and model.encoder.conv_out_logvar is not None:
        last, z = model.encoder.conv_out_logvar, 0
    else:
        return
    assert last.bias is not None
    last.weight[z:] = 0.0
    last.bias[z:] = -30.0
