"""The verb `init`, and the start of a training at the PCA of its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.loader import Batch, TrainLoader
from latentae.data.shard_files import expand_shards
from latentae.data.streaming import StreamLoader, streams
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError, RecipeError
from latentae.files import write_json
from latentae.jobs import Job
from latentae.measures.metrics import psnr
from latentae.models.config import AutoencoderDCConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.dc.head_start import check_head_start, start_at_pca
from latentae.models.initialization import set_initial_logvar
from latentae.models.pca import PATCHES_PER_COMPONENT, PatchPCA, fit_pca, image_patches, sketch_pca
from latentae.options import recipe_verb
from latentae.progress import Progress, say
from latentae.training.launch import on_main
from latentae.training.options import InitOptions
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.steps import Trainer, build_autoencoder
from latentae.training.training_data import held_out_batches, job_inputs, make_shards

__all__ = ["HeadStart", "fit_head_start", "init", "mean_psnr", "take_head_start"]

REPORT = "head_start.json"
CLOSED_FORM = 4 * 16 * 16  # numbers per patch; at f32 the closed form takes a minute, one pass takes seconds
PATCHES = 20_000  # at least this many patches are sampled,
PATCHES_PER_NUMBER = 8  # and this many per number of a patch
LARGEST_SAMPLE = 2**28  # bytes of images kept in memory
BATCH = 16


@recipe_verb(InitOptions)
def init(options: InitOptions) -> dict[str, Any]:
    """Write the recipe's autoencoder at the PCA of the shards' images, without training.

    The folder loads as any MODEL does, also in diffusers, and as `model.init_from` of recipes of
    the same shape.

    Returns:
        The content of `out`/head_start.json: `patches` and `crops` that PCA was fitted on,
        `explained` (share of the variance) and, with held-out images, `pca_psnr` and `psnr` of the
        model in dB (None if all images are exact).

    Raises:
        RecipeError, DataError, ModelError, OutputError: one line each.
    """
    own = {"data.shards": str(options.shards), "model.initialization": "pca"}
    recipe = load_recipe(options.recipe, {**options.overrides, **own})
    if recipe.model.init_from is not None:
        raise RecipeError(
            f"model.init_from is {recipe.model.init_from}, but init starts at PCA; leave init_from out"
        )
    recipe = make_shards(recipe, Path(options.out))
    job = Job.open(options.out, "init", job_inputs(recipe))
    if job.state == "finished":
        say(f"{options.out} is finished; nothing to do")
        return Job.read(job.folder)["summary"]
    head_start = fit_head_start(recipe)
    say(str(head_start))
    model = head_start.build(recipe).eval()
    report = _report(recipe, head_start, model)
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
    held_out = held_out_batches(recipe.data, recipe.batch_size, recipe.log.validation_images)
    batches = [batch.images for batch in held_out]
    if batches:

        @torch.inference_mode()
        def reconstruct(images: Tensor) -> Tensor:
            return to_uint8(model(to_float(images), sample_posterior=False).reconstruction)

        pca, own = (mean_psnr(codec, batches) for codec in (head_start.pca.reconstruct, reconstruct))
        say(f"held out: PCA {pca:.2f} dB, the model {own:.2f} dB")
        for name, value in (("pca_psnr", pca), ("psnr", own)):
            report[name] = value if math.isfinite(value) else None  # JSON has no infinity
    return report


@dataclass(frozen=True)
class HeadStart:
    """Principal components, and the crops that they were fitted on.

    Attributes:
        pca: of patches whose side is the model's downsampling.
        images: batches of uint8 [B, C, H, W].
        explained: share of the crops' variance around the mean patch that the components keep.
    """

    pca: PatchPCA
    images: list[Tensor]
    explained: float

    def build(self, recipe: Recipe) -> AutoencoderDC:
        """The recipe's autoencoder at this start, on the CPU.

        Its residual branches depend on the recipe's seed.
        """
        with torch.random.fork_rng(devices=[]):
            model = build_autoencoder(recipe)
            assert isinstance(model, AutoencoderDC)
            start_at_pca(model, self.pca, self.images)
        set_initial_logvar(model, recipe.model.initial_logvar)
        return model

    def __str__(self) -> str:
        pca, crops = self.pca, sum(map(len, self.images))
        return (
            f"PCA of {pca.patches:,} patches of {pca.patch} x {pca.patch} pixels from {crops:,} training "
            f"crops: {pca.components} components keep {self.explained:.2%} of the variance"
        )


def fit_head_start(recipe: Recipe) -> HeadStart:
    """Fit principal components to crops as the recipe's first steps see them.

    The number of processes does not matter.

    Raises:
        ModelError: the recipe's model can't start at PCA.
        DataError: too few images, or patches too small, for the components.
    """
    config = recipe.autoencoder_config()
    assert isinstance(config, AutoencoderDCConfig)  # the recipe checks it
    check_head_start(config)
    f, z, numbers = config.downsampling, config.latent_channels, config.in_channels * config.downsampling**2
    if z > numbers:
        raise DataError(
            f"a patch of {f} x {f} pixels has {numbers} principal components, fewer than the {z} latent "
            "channels; use fewer latent channels"
        )
    closed = numbers <= CLOSED_FORM
    needed = numbers if closed else PATCHES_PER_COMPONENT * z
    images = _crops(recipe, max(PATCHES, PATCHES_PER_NUMBER * numbers, needed), f)
    pca = (fit_pca if closed else sketch_pca)(images, f, z)
    variance = _variance(images, pca)
    explained = pca.variances.sum().item() / variance if variance > 0 else 1.0  # 0: equal images
    return HeadStart(pca, images, explained)


def take_head_start(trainer: Trainer, held_out: Sequence[Batch]) -> None:
    """Set a new trainer's weights and their average to PCA, if its recipe starts there.

    The PSNR of PCA on the held-out images is logged.

    Raises:
        ModelError, DataError: from `fit_head_start`, on all processes.
    """
    recipe, accelerator, model = trainer.recipe, trainer.accelerator, trainer.raw_autoencoder
    if recipe.model.initialization != "pca" or recipe.model.init_from is not None:
        return
    assert isinstance(model, AutoencoderDC)
    on_main(accelerator, lambda: _start(model, recipe, held_out))
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(broadcast(value.contiguous(), from_process=0))  # pyright: ignore[reportArgumentType]
    trainer.ema.load_state_dict(model.state_dict())


def _start(model: AutoencoderDC, recipe: Recipe, held_out: Sequence[Batch]) -> None:
    head_start = fit_head_start(recipe)
    say(str(head_start))
    model.load_state_dict(head_start.build(recipe).state_dict())
    batches = [batch.images for batch in held_out]
    if batches:
        say(f"held out, before the first step: PCA {mean_psnr(head_start.pca.reconstruct, batches):.2f} dB")


def mean_psnr(reconstruct: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> float:
    """Mean PSNR over images [B, C, H, W] in dB; 16-bit images are converted to 8 bits."""
    return torch.cat([psnr(images, reconstruct(images)) for images in map(_narrow, batches)]).mean().item()


def _crops(recipe: Recipe, patches: int, f: int) -> list[Tensor]:
    """Batches of training crops with at least `patches` patches, or as many as fit into memory."""
    data, size = recipe.data.model_copy(update={"workers": 0}), min(BATCH, recipe.batch_size)
    if streams(expand_shards(str(data.shards)), data.index):
        loader: TrainLoader | StreamLoader = StreamLoader(data, size, recipe.seed, 0)
    else:
        loader = TrainLoader(data, size, recipe.seed)
    found, seen, total, source = list[Tensor](), 0, 0, iter(loader)
    with Progress("reading crops for PCA", None) as progress:
        while seen < patches and total < LARGEST_SAMPLE:
            images = _narrow(next(source).images)
            height, width = (side // f * f for side in images.shape[2:])
            cut = images[:, :, :height, :width]
            found.append(cut)
            seen, total = seen + cut[:, 0].numel() // f**2, total + cut.numel()
            progress.advance(len(cut))
    return found


def _narrow(images: Tensor) -> Tensor:
    """16-bit images as 8-bit images."""
    return images if images.dtype == torch.uint8 else to_uint8(to_float(images))


def _variance(images: list[Tensor], pca: PatchPCA) -> float:
    """Mean squared distance of a patch from PCA's mean patch, on the [0, 255] scale."""
    squares = sum((image_patches(batch, pca.patch) - pca.mean).square().sum().item() for batch in images)
    return squares / pca.patches
