"""The verb `sample`: decode latents from a variational model's prior or from a fitted Gaussian."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import DataError, ImageError, ModelError, RecipeError
from latentae.file_names import RECORD
from latentae.jobs import Job
from latentae.keyed import keyed_normal
from latentae.models.latent_statistics import Moments
from latentae.options import verb
from latentae.progress import Progress, say
from latentae.tasks.inputs import open_images
from latentae.tasks.network import Network
from latentae.tasks.options import SampleOptions
from latentae.tasks.outputs import check_png, thumbnails, write_noted_png

__all__ = ["LatentGaussian", "fit_latent_gaussian", "sample"]

WEAK_KL = 1e-3  # with 1e-3 latents are about standard normal; kl-f8's 1e-6 allows any distribution
FULL_NUMBERS = 2048
"""Numbers per latent up to which their full covariance is fitted: 34 MB, and seconds to sample."""


@verb(SampleOptions)
def sample(options: SampleOptions) -> dict[str, Any]:
    """Decode random latents to a picture.

    Without `latents` they are samples of the prior N(0, I), which is useful only for a model
    trained towards it: a model without a prior is refused, and a weak KL weight is logged. With
    `latents` a Gaussian is fitted to them: to full latents of up to 2048 numbers, else to the
    channels of each position separately.

    Returns:
        `file` and the settings, which are also in the PNG's text chunk "latentae".

    Raises:
        LatentAEError: the model, the latents or an option can't be used.
    """
    file, network = check_png(options.out), Network(options, options.batch_size)
    note = {"task": "sample", "count": options.count, "seed": options.seed, "model": network.fingerprint}
    if options.latents is None:
        side = network.side // network.config.downsampling
        note |= {"distribution": "prior N(0, I)", **_prior_note(network)}
        drawn = _noise(options, (network.config.latent_channels, side, side))
    else:
        gaussian = fit_latent_gaussian(_posteriors(network, options))
        fitted = "whole latents" if gaussian.full else "the channels of each place"
        note |= {"distribution": f"Gaussian fitted to {fitted}", "fitted_on": gaussian.count}
        drawn = gaussian.color(_noise(options, gaussian.mean.shape))
    write_noted_png(file, thumbnails([network.decode(drawn)]), note)
    article = "the" if options.latents is None else "a"
    say(f"sample: {options.count} pictures from {article} {note['distribution']} in {file}")
    return {"file": str(file), **note}


def _noise(options: SampleOptions, shape: Iterable[int]) -> Tensor:
    """Noise of each picture from its own key, so that it does not depend on `count`."""
    return keyed_normal((options.count, *shape), options.seed, 0, 0, "sample")


def _prior_note(network: Network) -> dict[str, Any]:
    """The KL weight of the training.

    Raises:
        ModelError: the model has no prior.
    """
    advice = "give latents (or images) to fit a Gaussian to"
    if network.config.class_name == "LinearAutoencoder":
        raise ModelError(f"{network.source.path} is a linear autoencoder, which has no prior; {advice}")
    recipe = network.source.recipe()
    if recipe is None:
        say(f"sample: {network.source.path} has no recipe; if its KL weight was small, {advice}")
        return {"kl": None}
    kl = float(recipe.get("loss", {}).get("kl", 0.0))
    if recipe.get("model", {}).get("bottleneck") == "deterministic" or kl == 0:
        raise ModelError(f"{network.source.path} was trained without KL and has no prior; {advice}")
    if kl < WEAK_KL:
        say(f"sample: its KL weight {kl:g} hardly pulls latents to the prior; for better pictures, {advice}")
    return {"kl": kl}


def _posteriors(network: Network, options: SampleOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and variance of encoded latents, or of the latents of images."""
    assert options.latents is not None
    if isinstance(options.latents, str | Path) and (record := _encoded(options.latents)) is not None:
        yield from _stored(network, options, LatentDataset(options.latents), record)
        return
    images = open_images(options.latents, max_pixels=options.max_pixels)
    with Progress("sample: fitting", images.count) as progress:
        for batch in network.batches(images, range(images.count), resolution=network.side):
            posterior = network.encode(batch)
            yield posterior.mean, posterior.logvar.exp()
            progress.advance(len(batch.items))


def _encoded(path: str | Path) -> Mapping[str, Any] | None:
    """The record of an output of `encode`, or None for anything else."""
    if not (Path(path) / RECORD).is_file():
        return None
    record = Job.read(path)
    return record if record.get("verb") == "encode" else None


def _stored(
    network: Network, options: SampleOptions, latents: LatentDataset, record: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    if record.get("inputs", {}).get("model") != network.fingerprint:
        raise ModelError(
            f"{options.latents} was encoded with another model, or with its other weights; "
            f"give latents of {network.source.path}"
        )
    if options.resolution is not None and any((latents.sizes != options.resolution).flatten()):
        raise RecipeError(
            f"resolution is {options.resolution}, but {options.latents} has latents of other sizes; "
            "leave it out"
        )
    with Progress("sample: fitting", len(latents), "latents") as progress:
        for index in range(len(latents)):
            posterior = latents.posterior(index)
            yield posterior.mean[None], posterior.logvar[None].exp()
            progress.advance()


@dataclass(frozen=True)
class LatentGaussian:
    """Normal distribution of latents.

    Attributes:
        mean: fp64 [z, h, w].
        root: fp64 R with R R^T the covariance: [zhw, zhw], or [z, z] for the deviations from `mean`
            at every position, where positions are independent.
        count: number of latents of the fit.
    """

    mean: Tensor
    root: Tensor
    count: int

    @property
    def full(self) -> bool:
        """Whether positions vary together, as they do in images."""
        return len(self.root) == self.mean.numel()

    def color(self, noise: Tensor) -> Tensor:
        """Standard normal noise [B, z, h, w] -> samples mean + R noise, fp32 [B, z, h, w]."""
        noise = noise.double()
        if self.full:
            return (self.mean + (noise.flatten(1) @ self.root.T).view_as(noise)).float()
        return (self.mean + torch.einsum("ij,bjhw->bihw", self.root, noise)).float()


def fit_latent_gaussian(posteriors: Iterable[tuple[Tensor, Tensor]]) -> LatentGaussian:
    """Fit to sampled latents without sampling: Cov[z] = Cov[mean] + E[sigma^2] (total variance).

    Args:
        posteriors: mean and variance of batches, each [B, z, h, w], all of one size; read once.

    Raises:
        DataError: fewer than two latents.
        ImageError: latents of different sizes.
    """
    moments, total, spread, count = None, torch.zeros(()), torch.zeros(()), 0
    for mean, variance in posteriors:
        mean, variance = mean.double().cpu(), variance.double().cpu()
        if count and mean.shape[1:] != total.shape:
            sizes = " after ".join(" x ".join(map(str, shape)) for shape in (mean.shape[1:], total.shape))
            raise ImageError(f"found a latent of {sizes}; give images of one size, or a resolution")
        full = mean[0].numel() <= FULL_NUMBERS
        found = Moments.of(mean.flatten(1) if full else mean.transpose(0, 1).flatten(1).T)
        moments = found if moments is None else moments.merge(found)
        total, spread, count = total + mean.sum(dim=0), spread + variance.sum(dim=0), count + len(mean)
    if moments is None or count < 2:
        raise DataError(f"found {count} latents, expected 2 or more to fit a Gaussian; give more images")
    mean, noise = total / count, spread / count
    covariance = torch.from_numpy(moments.m2 / moments.count)
    if mean.numel() <= FULL_NUMBERS:
        return LatentGaussian(mean, _root(covariance + noise.flatten().diag()), count)
    # without the variation of the mean itself over positions
    vectors = mean.flatten(1) - torch.from_numpy(moments.mean)[:, None]
    within = covariance - vectors @ vectors.T / vectors.shape[1]
    return LatentGaussian(mean, _root(within + noise.mean(dim=(1, 2)).diag()), count)


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root; also exists for a singular covariance (few latents)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
