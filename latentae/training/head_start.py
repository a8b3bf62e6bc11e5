"""A start at PCA: training crops, their principal components, and the weights that are them, the same on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.data.loader import TrainLoader
from latentae.data.shard_files import expand_shards
from latentae.data.streaming import StreamLoader, streams
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError
from latentae.measures.metrics import psnr
from latentae.models.config import AutoencoderDCConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.dc.head_start import check_head_start, start_at_pca
from latentae.models.initialization import set_initial_logvar
from latentae.models.pca import PATCHES_PER_COMPONENT, PatchPCA, fit_pca, image_patches, sketch_pca
from latentae.progress import Progress, say
from latentae.training.launch import on_main
from latentae.training.recipe import Recipe
from latentae.training.steps import Trainer, build_autoencoder
from latentae.training.validation import Validation

__all__ = ["HeadStart", "fit_head_start", "mean_psnr", "take_head_start"]

CLOSED_FORM = (
    4 * 16 * 16
)  # numbers of a patch: an f32 patch takes a minute of one core there, and seconds in one pass
PATCHES = 20_000  # at least; or so many for each number of a patch:
PATCHES_PER_NUMBER = 8
LARGEST_SAMPLE = 2**28  # bytes of images that are held
BATCH = 16


@dataclass(frozen=True)
class HeadStart:
    """Principal components and the crops they were fitted on.

    Attributes:
        pca: of patches of the model's downsampling.
        images: batches of uint8 [B, C, H, W].
        explained: share of the crops' variance, about the mean patch, that the components keep.
    """

    pca: PatchPCA
    images: list[Tensor]
    explained: float

    def build(self, recipe: Recipe) -> AutoencoderDC:
        """The recipe's autoencoder at this start, on the CPU; its branches are what the recipe's seed gives."""
        with torch.random.fork_rng(devices=[]):
            model = build_autoencoder(recipe)
            assert isinstance(model, AutoencoderDC)
            start_at_pca(model, self.pca, self.images)
        set_initial_logvar(model, recipe.model.initial_logvar)
        return model

    def __str__(self) -> str:
        crops = sum(map(len, self.images))
        return (
            f"PCA of {self.pca.patches:,} patches of {self.pca.patch} x {self.pca.patch} pixels from {crops:,} training crops: "
            f"{self.pca.components} components keep {self.explained:.2%} of the variance"
        )


def fit_head_start(recipe: Recipe) -> HeadStart:
    """Principal components of crops as the recipe's first steps would see them, on any number of processes the same.

    Raises:
        ModelError: the recipe's model can't start at PCA.
        DataError: too few images for the components of so large a patch.
    """
    config = recipe.autoencoder_config()
    assert isinstance(config, AutoencoderDCConfig)  # of a recipe that starts at PCA
    check_head_start(config)
    f, z, numbers = config.downsampling, config.latent_channels, config.in_channels * config.downsampling**2
    if z > numbers:
        raise DataError(
            f"a patch of {f} x {f} pixels has {numbers} principal components, fewer than the {z} latent channels"
        )
    closed = numbers <= CLOSED_FORM
    needed = numbers if closed else PATCHES_PER_COMPONENT * z
    images = _crops(recipe, max(PATCHES, PATCHES_PER_NUMBER * numbers, needed), f)
    pca = (fit_pca if closed else sketch_pca)(images, f, z)
    variance = _variance(images, pca)
    return HeadStart(
        pca, images, pca.variances.sum().item() / variance if variance > 0 else 1.0
    )  # equal images: nothing to lose


def take_head_start(trainer: Trainer, validation: Validation) -> None:
    """Start a new trainer's weights, and their average, at PCA if its recipe says so: on the first process, then on all.

    Raises:
        ModelError, DataError: as `fit_head_start` does, on all processes.
    """
    recipe, accelerator, model = trainer.recipe, trainer.accelerator, trainer.raw_autoencoder
    if recipe.model.initialization != "pca" or recipe.model.init_from is not None:
        return
    assert isinstance(model, AutoencoderDC)
    on_main(accelerator, lambda: _start(model, recipe, validation))
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(broadcast(value.contiguous(), from_process=0))  # pyright: ignore[reportArgumentType]
    trainer.ema.load_state_dict(model.state_dict())


def _start(model: AutoencoderDC, recipe: Recipe, validation: Validation) -> None:
    head_start = fit_head_start(recipe)
    say(str(head_start))
    model.load_state_dict(head_start.build(recipe).state_dict())
    batches = [batch.images for batch in validation.batches]
    if batches:
        say(f"held out, before the first step: PCA {mean_psnr(head_start.pca.reconstruct, batches):.2f} dB")


def mean_psnr(reconstruct: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> float:
    """In dB, the mean over images [B, C, H, W]; those of 16 bits are given and compared as such of 8."""
    return torch.cat([psnr(images, reconstruct(images)) for images in map(_narrow, batches)]).mean().item()


def _crops(recipe: Recipe, patches: int, f: int) -> list[Tensor]:
    """Batches of training crops with so many patches, or as many as fit into memory."""
    data = recipe.data.model_copy(update={"workers": 0})
    size = min(BATCH, recipe.batch_size)
    if streams(expand_shards(str(data.shards)), data.index):
        loader: TrainLoader | StreamLoader = StreamLoader(data, size, recipe.seed, 0)
    else:
        loader = TrainLoader(data, size, recipe.seed)
    found, seen, held, source = list[Tensor](), 0, 0, iter(loader)
    with Progress("reading crops for PCA", None) as progress:
        while seen < patches and held < LARGEST_SAMPLE:
            images = _narrow(next(source).images)
            cut = images[:, :, : images.shape[2] // f * f, : images.shape[3] // f * f]
            found.append(cut)
            seen, held = seen + cut[:, 0].numel() // f**2, held + cut.numel()
            progress.advance(len(cut))
    return found


def _narrow(images: Tensor) -> Tensor:
    """Images of 16 bits as such of 8."""
    return images if images.dtype == torch.uint8 else to_uint8(to_float(images))


def _variance(images: list[Tensor], pca: PatchPCA) -> float:
    """Mean square of a patch about PCA's mean patch, on the [0, 255] scale."""
    squares = sum((image_patches(batch, pca.patch) - pca.mean).square().sum().item() for batch in images)
    return squares / pca.patches
