"""The card's examples, one for each way to load the folder. Tests run them as they are printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentae.exporting.card import CardFacts
    from latentae.exporting.scaling import LatentScaling

__all__ = ["snippets"]


def snippets(facts: CardFacts) -> str:
    """Every snippet that works on what was written."""
    shown = [WRITERS[name](facts) for name in facts.formats]
    if not {"diffusers", "ldm"}.isdisjoint(facts.formats):
        shown.insert(1 if "diffusers" in facts.formats else 0, _latentae(facts))
    if facts.preview is not None:
        shown.append(_preview(facts))
    return "\n".join(shown)


def _block(title: str, code: str) -> str:
    return f"{title}\n\n```python\n{code.strip()}\n```\n"


def _deterministic(facts: CardFacts) -> bool:
    """Whether the encoder gives latents, and no posterior: an AutoencoderDC's."""
    return facts.config.class_name == "AutoencoderDC"


def _formulas(scaling: LatentScaling) -> tuple[str, str]:
    """From the posterior's mean to latents as a diffusion model sees them, and back, in figures."""
    factor, shift = scaling.scaling_factor, scaling.shift_factor
    if (factor, shift) == (1.0, 0.0):
        return "mean", "latents"
    return f"(mean - {shift!r}) * {factor!r}", f"latents / {factor!r} + {shift!r}"


def _diffusers(facts: CardFacts) -> str:
    if _deterministic(facts):
        return _block(
            "With diffusers:",
            f"""
import torch
from diffusers import AutoencoderDC

vae = AutoencoderDC.from_pretrained("{facts.name}")
with torch.no_grad():
    latents = vae.encode(images).latent * vae.config.scaling_factor
    decoded = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
""",
        )
    return _block(
        "With diffusers:",
        f"""
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{facts.name}")
with torch.no_grad():
    latents = (vae.encode(images).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
""",
    )


def _latentae(facts: CardFacts) -> str:
    if _deterministic(facts):
        return _block(
            "With latentae:",
            f"""
import torch
from latentae import AutoencoderDC

vae = AutoencoderDC.from_pretrained("{facts.name}")
with torch.no_grad():
    latents = vae.encode(images).mode() * vae.config.scaling_factor
    decoded = vae.decode(latents / vae.config.scaling_factor).clamp(-1, 1)
""",
        )
    return _block(
        "With latentae:",
        f"""
import torch
from latentae import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{facts.name}")
with torch.no_grad():
    latents = (vae.encode(images).sample() - vae.config.shift_factor) * vae.config.scaling_factor
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).clamp(-1, 1)
""",
    )


def _ldm(facts: CardFacts) -> str:
    notes = "\n".join(f"- {note}" for note in facts.ldm_notes)
    title = f"`vae.ldm.safetensors` has the same weights under LDM's names.\n\n{notes}\n\nIn Python:"
    return _block(
        title,
        f"""
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_single_file("{facts.name}/vae.ldm.safetensors", config="{facts.name}", local_files_only=True)
with torch.no_grad():
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
""",
    )


def _onnx(facts: CardFacts) -> str:
    normalise, back = _formulas(facts.scaling)
    if _deterministic(facts):
        note, taken = "", '(mean,) = encoder.run(None, {"sample": np.asarray(images)})'
    else:
        note = " (the encoder gives mean and log-variance, before any clamp)"
        taken = '(moments,) = encoder.run(None, {"sample": np.asarray(images)})\nmean, logvar = np.split(moments, 2, axis=1)'
    return _block(
        f"With ONNX Runtime; `images` as a NumPy array of float32{note}:",
        f"""
import numpy as np
import onnxruntime

encoder = onnxruntime.InferenceSession("{facts.name}/vae_encoder/model.onnx")
decoder = onnxruntime.InferenceSession("{facts.name}/vae_decoder/model.onnx")
{taken}
latents = {normalise}
(decoded,) = decoder.run(None, {{"latent_sample": {back}}})
""",
    )


def _pt2(facts: CardFacts) -> str:
    normalise, back = _formulas(facts.scaling)
    taken = (
        "mean = encode(images.contiguous())"
        if _deterministic(facts)
        else "mean, logvar = encode(images.contiguous()).chunk(2, dim=1)"
    )
    return _block(
        "With torch alone, compiled by AOTInductor for the machine and torch version it was exported on (input must be contiguous):",
        f"""
import torch
from torch._inductor import aoti_load_package

encode = aoti_load_package("{facts.name}/pt2/encoder.pt2")
decode = aoti_load_package("{facts.name}/pt2/decoder.pt2")
{taken}
latents = {normalise}
decoded = decode(({back}).contiguous()).clamp(-1, 1)
""",
    )


def _preview(facts: CardFacts) -> str:
    return _block(
        "A small picture of latents as a diffusion model sees them, without the decoder:",
        f"""
import json
import torch
from pathlib import Path

preview = json.loads(Path("{facts.name}/latent_preview.json").read_text())
factors, bias = (torch.tensor(preview[name]) for name in ("latent_rgb_factors", "latent_rgb_factors_bias"))
rgb = torch.einsum("bzhw,zc->bchw", torch.as_tensor(latents), factors) + bias.view(1, 3, 1, 1)
""",
    )


WRITERS: dict[str, Callable[[CardFacts], str]] = {
    "diffusers": _diffusers,
    "ldm": _ldm,
    "onnx": _onnx,
    "pt2": _pt2,
}
