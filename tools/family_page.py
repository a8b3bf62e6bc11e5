"""Train every variant of the family and its plain counterpart, and write the pictures and numbers
of docs/family.md.

    python tools/family_page.py --runs FOLDER [--only vae-digits ...] [--photo-images 2400] [--out
    FILE.json]

Each run is `latentae train RECIPE`; a finished run in FOLDER is reused, an interrupted one resumes.
A plain counterpart is the same recipe without the options that name the variant. Everything is
measured on held-out digits and photos.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarking import ROOT, command_line, save
from family_measures import channel_kl, error, hide, jacobian, movement, nearest, sampled, units_needed
from torch import Tensor

from latentae.data.builtin import HELD_OUT, digits, photo_tiles
from latentae.data.transforms import to_float, to_uint8
from latentae.losses.equivariance import Transform, downscale
from latentae.losses.spectrum import spectrum_matching
from latentae.models.base import Autoencoder
from latentae.models.corruptions import keep_channels
from latentae.models.linear import LinearAutoencoder
from latentae.models.pca import fit_pca, principal_angles
from latentae.models.pretrained import load_model
from latentae.pages.images import image_grid, write_png
from latentae.training.train import train

COLUMNS = 10
PHOTO_COLUMNS = 6
Result = tuple[dict[str, Any], list[list[Tensor]]]


class Family:
    """The trained models by run."""

    def __init__(self, runs: Path, digit_images: int | None, photo_images: int | None) -> None:
        self.runs, self.digit_images, self.photo_images = runs, digit_images, photo_images
        self.models: dict[str, Autoencoder] = {}

    def model(self, recipe: str, name: str = "", **overrides: Any) -> Autoencoder:
        """A recipe's model, trained if necessary; `name` is the run's if there are overrides."""
        name = name or recipe
        if name in self.models:
            return self.models[name]
        values: dict[str, Any] = {"log.tensorboard": False, "log.summary": False}
        values["log.validation_every_images"] = 10**9
        if recipe.endswith("-tiny"):
            values |= {"data.validation": "none", "checkpoint_every_images": 10**9}
        images = self.photo_images if recipe.endswith("-tiny") else self.digit_images
        if images is not None:
            values["images"] = images
        run = train(recipe, self.runs / name, **values, **overrides)
        assert run is not None
        self.models[name] = load_model(run)[0]
        return self.models[name]

    def plain(self, latent_channels: int) -> Autoencoder:
        """A plain autoencoder of digits."""
        return self.model(
            "undercomplete-digits", f"plain-{latent_channels}", **{"model.latent_channels": latent_channels}
        )

    def plain_photos(self) -> Autoencoder:
        """A plain autoencoder of photos."""
        return self.model("nested-tiny", "plain-tiny", **{"model.nested_channels": 0})


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Standard normal numbers from a fixed seed."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def rebuilt(model: Autoencoder, images: Tensor) -> Tensor:
    """Reconstructions of images."""
    return model.decode(model.encode(images).mean)


def prior(model: Autoencoder, count: int) -> Tensor:
    """Images decoded from standard normal latents."""
    shape = (count, model.config.latent_channels, 1, 1)
    return sampled(model, torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def rows(*images: Tensor, columns: int = COLUMNS) -> list[list[Tensor]]:
    """Rows of a picture."""
    return [list(row[:columns]) for row in images]


def linear(family: Family) -> Result:
    x, seen, model = to_float(digits("held-out")[0]), to_float(digits()[0]), family.model("linear-digits")
    assert isinstance(model, LinearAutoencoder)
    pca = fit_pca([digits()[0]], 8, model.config.latent_channels)
    exact = LinearAutoencoder(model.config)
    exact.load_pca(pca)
    numbers = {
        "channels": model.config.latent_channels,
        "error_over_pca_on_training_digits": error(model, seen) / error(exact, seen),
        "error_over_pca_on_held_out_digits": error(model, x) / error(exact, x),
        "error": error(model, x),
        "largest_angle_degrees": principal_angles(model.subspace(), pca.basis).max().item(),
    }
    return numbers, rows(x, rebuilt(exact, x), rebuilt(model, x))


def undercomplete(family: Family) -> Result:
    held_out, model = digits("held-out")[0], family.model("undercomplete-digits")
    x, z = to_float(held_out), model.config.latent_channels
    pca = to_float(fit_pca([digits()[0]], 8, z).reconstruct(held_out))
    numbers = {"error": error(model, x), "pca_error": (pca - x).square().mean().item(), "channels": z}
    return numbers, rows(x, pca, rebuilt(model, x))


def variational(family: Family) -> Result:
    x, seen = to_float(digits("held-out")[0]), to_float(digits()[0])
    model, plain = family.model("vae-digits"), family.plain(8)
    numbers = {
        name: {"error": error(m, x), "prior_to_nearest_training_digit": nearest(prior(m, 1024), seen)}
        for name, m in (("plain", plain), ("vae", model))
    }
    numbers["real"] = {"to_nearest_training_digit": nearest(x, seen)}
    numbers["vae"]["kl_nats"] = channel_kl(model, x).sum().item()
    return numbers, rows(prior(plain, COLUMNS), prior(model, COLUMNS), prior(model, 2 * COLUMNS)[COLUMNS:])


def beta(family: Family) -> Result:
    x, numbers = to_float(digits("held-out")[0]), {}
    model, plain = family.model("beta-vae-digits"), family.model("vae-digits")
    for name, m in (("vae", plain), ("beta-vae", model)):
        kl = channel_kl(m, x)
        numbers[name] = {"error": error(m, x), "kl_nats": kl.sum().item()}
        numbers[name]["channels_above_a_tenth_of_a_nat"] = int((kl > 0.1).sum())
    strongest = channel_kl(model, x).argsort(descending=True)[:3]
    walks = []
    for channel in strongest:
        latents = torch.zeros(COLUMNS, model.config.latent_channels, 1, 1)
        latents[:, channel, 0, 0] = torch.linspace(-2.5, 2.5, COLUMNS)
        walks.append(sampled(model, latents))
    return numbers, rows(*walks)


def denoising(family: Family) -> Result:
    x, model, plain = to_float(digits("held-out")[0]), family.model("denoising-digits"), family.plain(16)
    given = {std: x + std * noise(x) for std in (0.0, 0.4, 0.8)}
    numbers = {
        name: {f"error_at_noise_{std:g}": error(m, seen, x) for std, seen in given.items()}
        for name, m in (("plain", plain), ("denoising", model))
    }
    return numbers, rows(given[0.8], rebuilt(plain, given[0.8]), rebuilt(model, given[0.8]), x)


def masked(family: Family) -> Result:
    x, model, plain = to_float(digits("held-out")[0]), family.model("masked-digits"), family.plain(16)
    given, where = hide(x, 2, 0.375, torch.Generator().manual_seed(0))
    numbers = {
        name: {"error_where_hidden": error(m, given, x, where), "error_of_whole_images": error(m, x)}
        for name, m in (("plain", plain), ("masked", model))
    }
    return numbers, rows(given, rebuilt(plain, given), rebuilt(model, given), x)


def sparse(family: Family) -> Result:
    x, model, plain = to_float(digits("held-out")[0]), family.model("sparse-digits"), family.plain(64)
    wanted, kept = 0.1, 6
    numbers = {
        name: {
            "error": error(m, x),
            "units_for_an_error_of_0.1": units_needed(m, x, wanted),
            "units": m.config.latent_channels,
        }
        for name, m in (("plain", plain), ("sparse", model))
    }
    return numbers, rows(x, *(strongest(m, x, kept) for m in (plain, model)))


@torch.no_grad()
def strongest(model: Autoencoder, images: Tensor, count: int) -> Tensor:
    """Images of the `count` strongest units of each code."""
    code = model.encode(images).mean
    least = code.flatten(1).abs().topk(count, dim=1).values[:, -1].view(-1, 1, 1, 1)
    return model.decode(torch.where(code.abs() >= least, code, 0.0))


def contractive(family: Family) -> Result:
    x, model, plain = to_float(digits("held-out")[0]), family.model("contractive-digits"), family.plain(16)
    small = 0.3 * noise(x)
    numbers = {}
    for name, m in (("plain", plain), ("contractive", model)):
        energy, relative = jacobian(m, x[:128])
        moved = movement(m, x, small)
        numbers[name] = {"error": error(m, x), "jacobian": energy, "movement": moved}
        numbers[name]["jacobian_over_variance"] = relative
    return numbers, rows(x + small, rebuilt(plain, x + small), rebuilt(model, x + small))


def binary(family: Family) -> Result:
    images = digits("held-out", binary=True)[0]
    x, model = to_float(images), family.model("binary-digits")
    shown = rebuilt(model, x)
    numbers = {
        "pixels_wrong": ((shown > 0) != (x > 0)).float().mean().item(),
        "kl_nats": channel_kl(model, x).sum().item(),
    }
    return numbers, rows(x, shown, prior(model, COLUMNS))


@cache
def photos(size: int) -> Tensor:
    """The center of every held-out tile."""
    tiles = torch.stack([tile for _, tile in photo_tiles(HELD_OUT, 128, 128)])
    start = (128 - size) // 2
    return to_float(tiles[..., start : start + size, start : start + size])


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, of clamped images in [-1, 1]."""
    return (10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().flatten(1).mean(dim=1))).mean().item()


def through(model: Autoencoder, images: Tensor, change: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
    """Images of changed latents."""
    with torch.no_grad():
        return model.decode(change(model.encode(images).mean))


def compared(
    name: str, model: Autoencoder, plain: Autoencoder, change: Any, target: Any = lambda x: x
) -> Result:
    """PSNR before and after a change of the latent, and a picture: target, plain, this."""
    x, crops = photos(64), photos(32)[:: max(1, len(photos(32)) // PHOTO_COLUMNS)]
    numbers = {
        key: {
            "psnr": psnr(through(m, x), x),
            "psnr_of_the_changed_latent": psnr(through(m, x, change), target(x)),
        }
        for key, m in (("plain", plain), (name, model))
    }
    pictures = [target(crops), through(plain, crops, change), through(model, crops, change)]
    return numbers, rows(*pictures, columns=PHOTO_COLUMNS)


def eq_vae(family: Family) -> Result:
    move, model = Transform(0.5, 1), family.model("eq-vae-tiny")
    return compared("eq-vae", model, family.plain_photos(), move.latent, lambda x: move.image(x, 4))


def scale(family: Family) -> Result:
    model, plain = family.model("se-tiny"), family.plain_photos()
    return compared("se", model, plain, lambda z: downscale(z, 2), lambda x: downscale(x, 2, 4))


def shaken(z: Tensor) -> Tensor:
    """Half a standard deviation of noise on each channel of a latent: free of scale."""
    return z + 0.5 * z.std(dim=(0, 2, 3), keepdim=True) * noise(z)


def rae(family: Family) -> Result:
    return compared("rae", family.model("rae-tiny"), family.plain_photos(), shaken)


def detok(family: Family) -> Result:
    return compared("detok", family.model("detok-tiny"), family.plain_photos(), shaken)


def nested(family: Family) -> Result:
    model, plain = family.model("nested-tiny"), family.plain_photos()
    return compared("nested", model, plain, lambda z: keep_channels(z, 4))


def spectrum(family: Family) -> Result:
    x, numbers, pictures = photos(64), {}, [photos(32)[::8]]
    for name, model in (("plain", family.plain_photos()), ("spectrum", family.model("spectrum-tiny"))):
        with torch.no_grad():
            z = model.encode(x).mean
            unit = (z - z.mean(dim=(0, 2, 3), keepdim=True)) / z.std(dim=(0, 2, 3), keepdim=True)
            numbers[name] = {
                "psnr": psnr(through(model, x), x),
                "spectral_divergence": spectrum_matching(unit, x).mean().item(),
            }
            code = model.encode(photos(32)[::8]).mean[:, :3]
            code = code / (2 * code.std(dim=(0, 2, 3), keepdim=True))
            pictures.append(F.interpolate(code, scale_factor=4, mode="nearest"))
    return numbers, rows(*pictures, columns=min(PHOTO_COLUMNS, len(pictures[0])))


VARIANTS: dict[str, Callable[[Family], Result]] = {
    "linear-digits": linear,
    "undercomplete-digits": undercomplete,
    "vae-digits": variational,
    "beta-vae-digits": beta,
    "denoising-digits": denoising,
    "masked-digits": masked,
    "sparse-digits": sparse,
    "contractive-digits": contractive,
    "binary-digits": binary,
    "eq-vae-tiny": eq_vae,
    "se-tiny": scale,
    "rae-tiny": rae,
    "detok-tiny": detok,
    "nested-tiny": nested,
    "spectrum-tiny": spectrum,
}


def picture(images: list[list[Tensor]]) -> Tensor:
    """A grid, digits enlarged four times and photos twice."""
    grid = []
    for row in images:
        shown = [image.expand(3, -1, -1) for image in row]
        grid.append([enlarged(to_uint8(image[None])[0], 4 if image.shape[-1] <= 8 else 2) for image in shown])
    return image_grid(grid, padding=3, columns=len(grid[0]))


def enlarged(image: Tensor, times: int) -> Tensor:
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of the runs")
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="only these variants")
    add("--digit-images", type=int, help="training images of the digit recipes (default: the recipe's)")
    add("--photo-images", type=int, help="training images of the photo recipes (default: the recipe's)")
    add("--pictures", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    options = parser.parse_args()
    family, found = Family(options.runs, options.digit_images, options.photo_images), {}
    for name in options.only:
        found[name], images = VARIANTS[name](family)
        write_png(options.pictures / f"family-{name}.png", picture(images))
        print(name, found[name], flush=True)
    out = options.out or ROOT / "benchmarks" / "cpu-2-cores" / "family.json"
    save(out, torch.device("cpu"), {"variants": found})


if __name__ == "__main__":
    main()
