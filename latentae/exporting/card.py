"""The model card: what the component is, how to load it, and which of its numbers were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentae.exporting.scaling import LatentScaling
from latentae.models.config import AutoencoderKLConfig

__all__ = ["CardFacts", "model_card"]


@dataclass(frozen=True)
class CardFacts:
    """All that a card says; what had to be measured was measured by whoever asks for the card."""

    name: str
    config: AutoencoderKLConfig
    scaling: LatentScaling
    parameters: int
    resolution: int
    """Image side in pixels at training, or what the config says."""
    weights: str
    """What was exported, in words."""
    version: str
    """Of latentae."""
    variant: str | None = None
    metrics: Mapping[str, str] | None = None
    """Label -> text, in the order to print."""


def model_card(facts: CardFacts) -> str:
    """The README.md of an exported folder, in Markdown with the metadata block that model hubs read."""
    config, scaling = facts.config, facts.scaling
    f, z, side = config.downsampling, config.latent_channels, facts.resolution
    ratio = config.in_channels * f * f / z
    return f"""\
---
library_name: diffusers
tags:
- autoencoder
- vae
- latentae
---

# {facts.name}

A convolutional KL autoencoder (`AutoencoderKL`) that turns {config.in_channels}-channel images into {z}-channel latents
at 1/{f} of their height and width, and back.

| | |
|---|---|
| Image | float, {config.in_channels} x H x W, range [-1, 1], H and W multiples of {f} |
| Latent | {z} x H/{f} x W/{f}; {z} x {side // f} x {side // f} for {side} x {side} pixels |
| Downsampling factor | {f} ({ratio:.3g} image values per latent value) |
| Made for | {side} x {side} pixels |
| Parameters | {facts.parameters:,} |
| Weights | {facts.weights} |
| Made with | latentae {facts.version} |

## Latent scaling

A diffusion model sees `(z - shift_factor) * scaling_factor`; its latents go to the decoder as
`latents / scaling_factor + shift_factor`.

| | |
|---|---|
| `scaling_factor` | {scaling.scaling_factor:.6g} |
| `shift_factor` | {scaling.shift_factor:.6g} |
| Where they come from | {scaling.origin} |
{_channels(scaling)}
## Use

With diffusers, from this folder or from the Hub (`images`: float [B, {config.in_channels}, H, W] in [-1, 1]):

```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{facts.name}")
with torch.no_grad():
    latents = (vae.encode(images).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
```

With latentae:

```python
import torch
from latentae import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{facts.name}")
with torch.no_grad():
    latents = (vae.encode(images).sample() - vae.config.shift_factor) * vae.config.scaling_factor
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).clamp(-1, 1)
```

{_precision(facts.variant)}

## Measured quality

{_metrics(facts.metrics)}

## Licence

latentae, which made this folder, is licensed under Apache-2.0. The weights are not covered by that: whoever publishes them
chooses their licence, within what the training images allow, and names it here and in the metadata above (`license: ...`).
No weights of perceptual networks (LPIPS, VGG) are part of this folder.
"""


def _channels(scaling: LatentScaling) -> str:
    """The measured mean and deviation of each channel, or nothing."""
    if scaling.measured is None:
        return ""
    pairs = zip(scaling.measured.mean, scaling.measured.std, strict=True)
    rows = [f"| {channel} | {mean:.4g} | {std:.4g} |" for channel, (mean, std) in enumerate(pairs)]
    return "\n".join(["", "| channel | mean | standard deviation |", "|---|---|---|", *rows, ""])


def _precision(variant: str | None) -> str:
    half = "Half-precision *activations* were not measured, so `force_upcast` is true: pipelines run this component in fp32."
    if variant is None:
        return f"The weights are fp32. {half}"
    return f'The weights are fp32, and once more in {variant} (`from_pretrained(..., variant="{variant}")`). {half}'


def _metrics(metrics: Mapping[str, str] | None) -> str:
    if not metrics:
        return "Not measured: no evaluation was given at export."
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in metrics.items())])
