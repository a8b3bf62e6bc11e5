"""Where the weights of an autoencoder start."""

from __future__ import annotations

import torch
from torch import nn

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.blocks import Attention, ResnetBlock

__all__ = ["set_deterministic", "set_initial_logvar", "start_linear"]


@torch.no_grad()
def start_linear(model: AutoencoderKL) -> None:
    """Begin as a nearly linear codec: every residual branch adds zero, every convolution keeps the variance of its input.

    PyTorch's own start shrinks what passes a convolution to a third of its variance, and the branches add noise to what is left;
    with few steps to spend, undoing that costs most of them. Branches at zero: Goyal et al. 2017, section 5.1; variance 1/fan-in:
    He et al. 2015, eq. 10, with gain 1 since the trunk has no activation.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        branch = module.conv2 if isinstance(module, ResnetBlock) else module.to_out[0] if isinstance(module, Attention) else None
        if branch is not None:
            for parameter in branch.parameters():
                nn.init.zeros_(parameter)


@torch.no_grad()
def set_initial_logvar(model: AutoencoderKL, logvar: float) -> None:
    """Shift the log-variance of the posterior by `logvar`, so that training begins with more or less noise on the latent."""
    last = model.quant_conv if model.quant_conv is not None else model.encoder.conv_out
    assert last.bias is not None
    last.bias[model.config.latent_channels :] += logvar


@torch.no_grad()
def set_deterministic(model: AutoencoderKL) -> None:
    """Give the posterior the smallest log-variance there is, -30, for every image: a sample is the mean, for everyone who loads it.

    Without a KL term and without sampling these weights get no gradient, so they stay.
    """
    last, z = model.quant_conv if model.quant_conv is not None else model.encoder.conv_out, model.config.latent_channels
    assert last.bias is not None
    last.weight[z:] = 0.0
    last.bias[z:] = -30.0
