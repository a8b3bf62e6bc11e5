"""The task `sample`: new pictures, from the prior of a variational model or from a Gaussian fitted to latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentae.data.epoch_order import whole_seed
from latentae.data.headers import MAX_PIXELS
from latentae.encoding.latents import LatentDataset
from latentae.errors import ModelError, RecipeError
from latentae.jobs import RECORD, Job
from latentae.measures.training_data import recorded_recipe
from latentae.pages.images import image_grid
from latentae.progress import Progress, say
from latentae.tasks.inputs import InputSpec, open_images, read_labels
from latentae.tasks.latent_gaussian import fit_latent_gaussian
from latentae.tasks.network import Network, batches
from latentae.tasks.pictures import check_png, enlarge, rgb, write_noted_png
from latentae.training.keyed import keyed_normal

__all__ = ["sample"]

WEAK_KL = 1e-3  # kl-f8's 1e-6 leaves latents of any shape; with 1e-3 they are about standard normal


def sample(
    model: str | Path,
    out: str | Path = "samples.png",
    *,
    count: int = 16,
    seed: int = 0,
    latents: InputSpec | None = None,
    resolution: int | None = None,
    batch_size: int = 16,
    weights: str = "ema",
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Decode random latents to a picture.

    Without `latents` they are drawn from the prior N(0, I), which means something only where the model was trained towards it; a
    model known to have no prior is refused, and of a weak one it is said. With `latents`, from a Gaussian fitted to those: of all
    numbers of a latent together up to 2048, beyond that of the channels of each place by itself. The PNG says which in its text
    chunk "latentae".

    Args:
        model: run folder, checkpoint or exported folder.
        out: the PNG to write; an existing one is replaced.
        count: pictures.
        seed: of the latents; the first pictures are the same whatever `count` is.
        latents: an output folder of `encode` of this model, or images (a folder, files or shards), which are then encoded.
        resolution: side of the pictures; the model's own when not given. Of an output of `encode` it is that of the latents.
        batch_size: images at a time.
        weights: "ema" or "raw".
        device: "auto", "cpu", "cuda" or "cuda:N".
        max_pixels: refuse images of more pixels by their header.

    Returns:
        `file`, and how it was made, which the PNG says, too.

    Raises:
        LatentAEError: the model, the latents or an option can't be used.
    """
    file = check_png(out)
    if count < 1:
        raise RecipeError(f"count is {count}, expected 1 or more")
    seed = whole_seed(seed)
    network = Network(model, weights, device)
    size = network.source.resolution if resolution is None else resolution
    network.check(size, batch_size)
    note: dict[str, Any] = {"task": "sample", "count": count, "seed": seed, "model": network.fingerprint}
    if latents is None:
        note |= {"distribution": "prior N(0, I)", **_prior_note(network)}
        side = size // network.downsampling
        drawn = _noise(count, (network.config.latent_channels, side, side), seed)
    else:
        gaussian = fit_latent_gaussian(
            _posteriors(network, latents, size, resolution, batch_size, max_pixels)
        )
        kind = "whole latents" if gaussian.whole else "the channels of each place"
        note |= {"distribution": f"Gaussian fitted to {kind}", "fitted_on": gaussian.latents}
        drawn = gaussian.color(_noise(count, gaussian.shape, seed))
    images = network.decode(drawn, batch_size)
    write_noted_png(file, image_grid([[enlarge(rgb(image)) for image in images]]), note)
    say(
        f"sample: {count} pictures from {'the ' if latents is None else 'a '}{note['distribution']} in {file}"
    )
    return {"file": str(file), **note}


def _noise(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Each picture has numbers of its own, so that it does not depend on how many there are."""
    return keyed_normal((count, *shape), seed, 0, 0, "sample")


def _prior_note(network: Network) -> dict[str, Any]:
    """What is known of the model's prior; ModelError where it has none."""
    advice = "give latents (or images) of its own to fit a Gaussian to"
    if network.config.class_name == "LinearAutoencoder":
        raise ModelError(f"{network.source.path} is a linear autoencoder, which has no prior; {advice}")
    recipe = recorded_recipe(network.source)
    if recipe is None:
        say(
            f"sample: {network.source.path} does not say how it was trained; if its KL weight was small, {advice}"
        )
        return {"kl": None}
    kl = float(recipe.get("loss", {}).get("kl", 0.0))
    if recipe.get("model", {}).get("bottleneck") == "deterministic" or kl == 0:
        raise ModelError(f"{network.source.path} was trained without KL and has no prior; {advice}")
    if kl < WEAK_KL:
        say(
            f"sample: its KL weight of {kl:g} hardly pulls latents towards the prior; for better pictures, {advice}"
        )
    return {"kl": kl}


def _posteriors(
    network: Network, latents: InputSpec, size: int, resolution: int | None, batch_size: int, max_pixels: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and variance of latents that were encoded before, or of those of images."""
    if isinstance(latents, str | Path) and (record := _encoded(latents)) is not None:
        if record.get("inputs", {}).get("model") != network.fingerprint:
            raise ModelError(
                f"{latents} was encoded with another model, or with its other weights; give latents of {network.source.path}"
            )
        dataset = LatentDataset(latents)
        if resolution is not None and any((dataset.sizes != resolution).flatten()):
            raise RecipeError(
                f"resolution is {resolution}, but {latents} holds latents of other sizes; leave it out"
            )
        with Progress("sample: fitting", len(dataset), "latents") as progress:
            for index in range(len(dataset)):
                posterior = dataset.posterior(index)
                yield posterior.mean[None], posterior.logvar[None].exp()
                progress.advance()
        return
    images, no_labels = open_images(latents, max_pixels=max_pixels), read_labels("none")[0]
    with Progress("sample: fitting", images.count) as progress:
        items = images.items(range(images.count), no_labels, channels=network.channels, resolution=size)
        for batch in batches(items, batch_size):
            posterior = network.encode(batch)
            yield posterior.mean, posterior.logvar.exp()
            progress.advance(len(batch.items))


def _encoded(path: str | Path) -> Mapping[str, Any] | None:
    """The record of an output of `encode`, or None for anything else."""
    if not (Path(path) / RECORD).is_file():
        return None
    record = Job.read(path)
    return record if record.get("verb") == "encode" else None
