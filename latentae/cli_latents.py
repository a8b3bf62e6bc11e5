"""The verbs of latents: encode a data set, check it, look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentae.cli_options import Device, MaxPixels, Model, Shards, Weights
from latentae.data.headers import MAX_PIXELS
from latentae.errors import OutputError

__all__ = ["decode", "encode", "stats", "verify"]

Latents = Annotated[str, typer.Argument(metavar="LATENTS", help="Output folder or URL of latentae encode.")]


def encode(
    model: Model,
    shards: Shards,
    out: Annotated[str, typer.Argument(help="Folder or URL for the latent shards.")],
    dtype: Annotated[str, typer.Option(help="Stored type: bf16, fp16 or fp32.")] = "bf16",
    compute_dtype: Annotated[
        str, typer.Option(help="Type to compute in: auto (bf16 on a GPU), fp32 or bf16.")
    ] = "auto",
    flip: Annotated[
        bool, typer.Option("--flip", help="Store the latents of the mirrored images too.")
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the encoded centre square; the model's own when not given.")
    ] = None,
    buckets: Annotated[
        str, typer.Option(help="auto: each image at the nearest of several aspect ratios; none: squares.")
    ] = "none",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    keep_images: Annotated[
        bool, typer.Option("--keep-images", help="Copy the images into the latent shards too.")
    ] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="One file of latents beside each shard, instead of one a sample.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode; the output does not depend on it.")
    ] = None,
    max_bad_share: Annotated[
        float, typer.Option(help="Fail at the end when more of the images than this can't be read.")
    ] = 0.01,
    task_id: Annotated[
        int | None, typer.Option(help="Which share of the shards, from 0; from the launcher when not given.")
    ] = None,
    num_tasks: Annotated[
        int | None, typer.Option(help="How many shares there are; from the launcher when not given.")
    ] = None,
    weights: Weights = "ema",
    device: Device = "auto",
    format: Annotated[
        str,
        typer.Option(
            help="latentae, or the trainer to write for: lightningdit, edm2, repa, mar, fastdit or kohya."
        ),
    ] = "latentae",
    engine: Annotated[
        str, typer.Option(help="local, or ray to spread the shards over a Ray cluster.")
    ] = "local",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Encode image shards to latent shards, one for one; the same command goes on where it stopped."""
    import latentae

    latentae.encode(
        model,
        shards,
        out,
        dtype=dtype,
        compute_dtype=compute_dtype,
        flip=flip,
        resolution=resolution,
        buckets=buckets,
        batch_size=batch_size,
        keep_images=keep_images,
        packed=packed,
        workers=workers,
        max_bad_share=max_bad_share,
        task_id=task_id,
        num_tasks=num_tasks,
        weights=weights,
        device=device,
        format=format,
        engine=engine,
        max_pixels=max_pixels,
    )


def verify(
    out: Latents,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read and hash every file, and look at every latent.")
    ] = False,
    shards: Annotated[
        str | None, typer.Option(help="The image shards, to compare with what was encoded.")
    ] = None,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget/--keep", help="Mark damaged shards as not done, so that encode makes them again."
        ),
    ] = True,
) -> None:
    """Check an output of encode; list what is wrong, and fail if anything is."""
    import latentae

    report = latentae.verify(out, deep=deep, shards=shards, forget=forget)
    for fault in report.faults:
        typer.echo(str(fault))
    if not report.ok:
        again = "; run the same encode command again, it makes these shards anew" if report.forgotten else ""
        raise OutputError(f"{len(report.faults)} fault{'s'[: len(report.faults) > 1]} in {out}{again}")
    typer.echo(f"{out}: {report.shards} shards with {report.samples} latents are in order", err=True)


def stats(out: Latents) -> None:
    """Print the statistics of latents channel by channel, and the scaling they suggest."""
    import latentae
    from latentae.encoding.stats import stats_table

    typer.echo(stats_table(latentae.stats(out)))


def decode(
    out: Latents,
    keys: Annotated[
        str | None, typer.Option(help="Keys of samples, with commas between; the first ones when not given.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="The model they were encoded with; found by itself if it has not moved."),
    ] = None,
    file: Annotated[Path, typer.Option("--out", help="The PNG to write.")] = Path("grid.png"),
    weights: Weights = "ema",
    device: Device = "auto",
) -> None:
    """Decode latents to a picture, beside the images where these were kept."""
    import latentae

    latentae.decode(
        out, keys.split(",") if keys else None, model=model, weights=weights, device=device, file=file
    )
