"""The verbs of tasks: what a trained model is good for by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentae.cli_options import Device, MaxPixels, Model, Weights
from latentae.data.headers import MAX_PIXELS

__all__ = ["anomaly", "denoise", "features", "interpolate", "sample"]

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUTS...", help="Folder of images, image files, or shards (folder, file or pattern)."
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Output folder.")]
Picture = Annotated[Path, typer.Option("--out", help="The PNG to write.")]
Resolution = Annotated[
    int | None,
    typer.Option(help="Side of the centre square of each image; each image's own shape when not given."),
]
Square = Annotated[int | None, typer.Option(help="Side of the pictures; the model's own when not given.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]
LabelSource = Annotated[
    str,
    typer.Option(
        help="auto (.cls beside the image), folder (the first of its key), none, or a CSV file with key,label."
    ),
]


def features(
    model: Model,
    inputs: Inputs,
    out: Out = Path("features"),
    pool: Annotated[
        str, typer.Option(help="mean, moments (mean and deviation over places) or spatial.")
    ] = "mean",
    format: Annotated[str, typer.Option(help="safetensors or npz.")] = "safetensors",
    labels: LabelSource = "auto",
    resolution: Resolution = None,
    batch_size: BatchSize = 16,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Write latents as features, and with labels the accuracy of a linear probe; the same command goes on where it stopped."""
    import latentae

    latentae.features(
        model,
        inputs,
        out,
        pool=pool,
        format=format,
        labels=labels,
        resolution=resolution,
        batch_size=batch_size,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
    )


def anomaly(
    model: Model,
    normal: Annotated[
        str,
        typer.Argument(metavar="NORMAL", help="Normal images not trained on: a folder, a file or shards."),
    ],
    inputs: Inputs,
    out: Out = Path("anomaly"),
    quantile: Annotated[
        float, typer.Option(help="Share of normal images that the threshold lets pass, or more.")
    ] = 0.95,
    score: Annotated[
        str, typer.Option(help="What decides: error, peak, latent, perceptual or combined.")
    ] = "error",
    perceptual: Annotated[
        str, typer.Option(help="auto, vgg, alex, squeeze, efficientnet-lite0 or none.")
    ] = "none",
    labels: LabelSource = "auto",
    heat_maps: Annotated[int, typer.Option(help="Pictures of the highest-scoring images, at most.")] = 32,
    seed: Annotated[
        int, typer.Option(help="Which half of the normal images the threshold is taken from.")
    ] = 0,
    resolution: Resolution = None,
    batch_size: BatchSize = 16,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Score how unlike normal images others are, with a threshold and heat maps; the same command goes on where it stopped."""
    import latentae

    latentae.anomaly(
        model,
        normal,
        inputs,
        out,
        quantile=quantile,
        score=score,
        perceptual=perceptual,
        labels=labels,
        heat_maps=heat_maps,
        seed=seed,
        resolution=resolution,
        batch_size=batch_size,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
    )


def denoise(
    model: Model,
    inputs: Inputs,
    out: Out = Path("denoised"),
    noise: Annotated[
        float,
        typer.Option(
            help="Add Gaussian noise of this standard deviation (scale of [-1, 1]) and measure the gain."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of that noise.")] = 0,
    resolution: Resolution = None,
    batch_size: BatchSize = 16,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Write what a model makes of noisy images; the same command goes on where it stopped."""
    import latentae

    latentae.denoise(
        model,
        inputs,
        out,
        noise=noise,
        seed=seed,
        resolution=resolution,
        batch_size=batch_size,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
    )


def interpolate(
    model: Model,
    a: Annotated[Path, typer.Argument(help="Image file.")],
    b: Annotated[Path, typer.Argument(help="Image file.")],
    out: Picture = Path("strip.png"),
    steps: Annotated[int, typer.Option(help="Pictures, both ends included.")] = 9,
    mode: Annotated[str, typer.Option(help="linear or spherical.")] = "linear",
    resolution: Square = None,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Show the pictures between two pictures."""
    import latentae

    latentae.interpolate(
        model,
        a,
        b,
        out,
        steps=steps,
        mode=mode,
        resolution=resolution,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
    )


def sample(
    model: Model,
    out: Picture = Path("samples.png"),
    count: Annotated[int, typer.Option(help="Pictures.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the latents.")] = 0,
    latents: Annotated[
        str | None,
        typer.Option(
            help="Output folder of encode, or images: draw from a Gaussian fitted to them instead of the prior."
        ),
    ] = None,
    resolution: Square = None,
    batch_size: BatchSize = 16,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Draw new pictures from a variational model's prior, or near latents that are given."""
    import latentae

    latentae.sample(
        model,
        out,
        count=count,
        seed=seed,
        latents=latents,
        resolution=resolution,
        batch_size=batch_size,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
    )
