"""The task `sample`: new pictures, from the prior of a variational model or from a Gaussian fitted to latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentae.encoding.latents import LatentDataset
from latentae.errors import ModelError, RecipeError
from latentae.file_names import RECORD
from latentae.jobs import Job
from latentae.keyed import keyed_normal
from latentae.measures.training_data import recorded_recipe
from latentae.options import verb
from latentae.pages.images import image_grid
from latentae.progress import Progress, say
from latentae.tasks.inputs import InputSpec, open_images, read_labels
from latentae.tasks.latent_gaussian import fit_latent_gaussian
from latentae.tasks.network import Network, batches
from latentae.tasks.options import SampleOptions
from latentae.tasks.pictures import check_png, enlarge, rgb, write_noted_png

__all__ = ["sample"]

WEAK_KL = 1e-3  # kl-f8's 1e-6 leaves latents of any shape; with 1e-3 they are about standard normal


@verb(SampleOptions)
def sample(options: SampleOptions) -> dict[str, Any]:
    """Decode random latents to a picture.

    Without `latents` they are drawn from the prior N(0, I), which means something only where the model was trained towards it; a
    model known to have no prior is refused, and of a weak one it is said. With `latents`, from a Gaussian fitted to those: of all
    numbers of a latent together up to 2048, beyond that of the channels of each place by itself. The PNG says which in its text
    chunk "latentae".

    Returns:
        `file`, and how it was made, which the PNG says, too.

    Raises:
        LatentAEError: the model, the latents or an option can't be used.
    """
    file = check_png(options.out)
    if options.count < 1:
        raise RecipeError(f"count is {options.count}, expected 1 or more")
    network = Network(options.model, options.weights, options.device)
    size = network.source.resolution if options.resolution is None else options.resolution
    network.check(size, options.batch_size)
    note: dict[str, Any] = {
        "task": "sample",
        "count": options.count,
        "seed": options.seed,
        "model": network.fingerprint,
    }
    if options.latents is None:
        note |= {"distribution": "prior N(0, I)", **_prior_note(network)}
        side = size // network.downsampling
        drawn = _noise(options.count, (network.config.latent_channels, side, side), options.seed)
    else:
        gaussian = fit_latent_gaussian(
            _posteriors(
                network, options.latents, size, options.resolution, options.batch_size, options.max_pixels
            )
        )
        kind = "whole latents" if gaussian.whole else "the channels of each place"
        note |= {"distribution": f"Gaussian fitted to {kind}", "fitted_on": gaussian.latents}
        drawn = gaussian.color(_noise(options.count, gaussian.shape, options.seed))
    images = network.decode(drawn, options.batch_size)
    write_noted_png(file, image_grid([[enlarge(rgb(image)) for image in images]]), note)
    say(
        f"sample: {options.count} pictures from {'the ' if options.latents is None else 'a '}{note['distribution']} in {file}"
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
