"""The verb `init`: a model folder that starts at PCA of a data set, before any training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import RecipeError
from latentae.files import write_json
from latentae.jobs import Job
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.options import recipe_verb
from latentae.progress import say
from latentae.training.head_start import HeadStart, fit_head_start, mean_psnr
from latentae.training.options import InitOptions
from latentae.training.preparation import job_inputs, make_shards
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.validation import held_out_batches

__all__ = ["init"]

REPORT = "head_start.json"


@recipe_verb(InitOptions)
def init(options: InitOptions) -> dict[str, Any]:
    """Write the recipe's autoencoder as it is before its first step if it starts at PCA of the shards' images.

    The folder loads wherever a MODEL does, in diffusers too, and as `model.init_from` of any recipe of the same shape.

    Returns:
        What is in `out`/head_start.json: `patches` and `crops` that PCA was fitted on, `explained` (share of the variance) and, where there
        are held-out images, `pca_psnr` and `psnr` of the model, in dB (None if all images are exact).

    Raises:
        RecipeError, DataError, ModelError, OutputError: one line each.
    """
    overrides = {
        **options.overrides,
        "data.shards": str(options.shards),
        "model.initialization": "pca",
    }
    resolved = load_recipe(options.recipe, overrides)
    if resolved.model.init_from is not None:
        raise RecipeError(
            f"the recipe begins with the weights of {resolved.model.init_from}; leave model.init_from out to begin at PCA"
        )
    resolved = make_shards(resolved, Path(options.out))
    job = Job.open(options.out, "init", job_inputs(resolved))
    if job.state == "finished":
        say(f"{options.out} is finished; nothing to do")
        return Job.read(job.folder)["summary"]
    head_start = fit_head_start(resolved)
    say(str(head_start))
    model = head_start.build(resolved).eval()
    report = _report(resolved, head_start, model)
    model.save_pretrained(job.folder)
    write_json(job.folder / REPORT, report)
    job.finish(summary=report)
    say(f"wrote {options.out}")
    return report


def _report(recipe: Recipe, head_start: HeadStart, model: AutoencoderDC) -> dict[str, Any]:
    report: dict[str, Any] = {
        "patches": head_start.pca.patches,
        "crops": sum(map(len, head_start.images)),
        "explained": head_start.explained,
    }
    batches = [
        batch.images
        for batch in held_out_batches(recipe.data, recipe.batch_size, recipe.log.validation_images)
    ]
    if batches:
        codecs = {"pca_psnr": head_start.pca.reconstruct, "psnr": _reconstruction(model)}
        found = {name: mean_psnr(codec, batches) for name, codec in codecs.items()}
        say(f"held out: PCA {found['pca_psnr']:.2f} dB, the model {found['psnr']:.2f} dB")
        report |= {
            name: value if math.isfinite(value) else None for name, value in found.items()
        }  # JSON knows no infinity
    return report


def _reconstruction(model: AutoencoderDC) -> Callable[[Tensor], Tensor]:
    """Of uint8 images, as uint8 images."""

    @torch.inference_mode()
    def reconstruct(images: Tensor) -> Tensor:
        return to_uint8(model(to_float(images), sample_posterior=False).reconstruction)

    return reconstruct
