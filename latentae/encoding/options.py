"""Options of the verbs that write and read latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator

from latentae.data.headers import MAX_PIXELS
from latentae.data.options import MAX_PIXELS_HELP, MODEL, SHARDS, ImageOptions
from latentae.options import KW_ONLY, Device, Inputs, PathLike, Weights, argument, option, table

__all__ = ["DecodeOptions", "EncodeOptions", "StatsOptions", "VerifyOptions"]

_OUT = "Output folder or URL of `latentae encode`, finished or not."


@table
class EncodeOptions(ImageOptions):
    """Encode image shards to latent shards, one to one. Run the same command again to resume."""

    model: PathLike = argument(MODEL)
    shards: Inputs = argument(SHARDS)
    out: PathLike = argument("Folder or URL for the latent shards.")
    _: KW_ONLY
    dtype: Literal["bf16", "fp16", "fp32"] = option(
        "Stored type of mean and logvar.", default="bf16", identity=True
    )
    compute_dtype: Literal["auto", "fp32", "bf16"] = option(
        "Type to compute in; auto is bf16 on CUDA, else fp32.", default="auto"
    )
    flip: bool = option(
        "Also store the latents of the horizontally flipped images.", default=False, identity=True
    )
    resolution: int | None = option(
        "Side of the encoded center crop in pixels; defaults to the model's own.", default=None
    )
    buckets: Literal["none", "auto"] = option(
        "'auto' encodes each image at the nearest of several aspect ratios with about resolution^2 "
        "pixels; 'none' at the square.",
        default="none",
    )
    batch_size: int = option("Images per batch; halved on out-of-memory.", default=16, ge=1)
    packed: bool = option(
        "Store one stacked latent file per shard instead of one per sample.", default=False, identity=True
    )
    keep_images: bool = option("Also copy the images into the latent shards.", default=False, identity=True)
    workers: int | None = option(
        "Decoding threads; defaults to one on a CPU and to one per core with a GPU. They do not change "
        "the output.",
        default=None,
        ge=0,
    )
    max_bad_share: float = option(
        "Fail at the end if more than this share of the images is unreadable.", default=0.01, ge=0, le=1
    )
    task_id: int | None = option(
        "Index of this task, from 0; defaults to RANK, or the index in a SLURM array.", default=None
    )
    num_tasks: int | None = option(
        "Number of tasks; defaults to WORLD_SIZE, or the size of the SLURM array.", default=None
    )
    format: Literal["latentae", "lightningdit", "edm2", "repa", "mar", "fastdit", "kohya"] = option(
        "Layout: latentae's own, or that of a diffusion trainer, which is written to OUT/FORMAT from "
        "latents in OUT/latents.",
        default="latentae",
    )
    engine: Literal["local", "ray"] = option("'ray' spreads the shards over a Ray cluster.", default="local")
    max_pixels: int = option(MAX_PIXELS_HELP, default=MAX_PIXELS, ge=1, identity="changed")


@table
class VerifyOptions:
    """Check an output of encode and list its faults. Fails if there are any."""

    out: PathLike = argument(_OUT, metavar="LATENTS")
    deep: bool = argument(
        "Read every byte: hashes, tars, members, and the values of each latent.", default=False
    )
    _: KW_ONLY
    shards: Inputs | None = option("Image shards to compare with the latents.", default=None)
    forget: bool = option(
        "Mark damaged shards as not done, so that encode writes them again.",
        default=True,
        name="forget/--keep",
    )


@table
class StatsOptions:
    """Print per-channel statistics of latents. Also prints the scaling they suggest."""

    out: PathLike = argument(_OUT, metavar="LATENTS")


def _split(keys: object) -> object:
    return keys.split(",") if isinstance(keys, str) else keys


@table
class DecodeOptions:
    """Decode latents to one picture. Originals are above, if they were stored."""

    out: PathLike = argument(_OUT, metavar="LATENTS")
    keys: Annotated[Sequence[str] | None, BeforeValidator(_split)] = argument(
        "Keys of samples to show, separated by commas; defaults to the first eight.",
        default=None,
        metavar="KEY,KEY...",
    )
    _: KW_ONLY
    model: PathLike | None = option("Model of the latents; defaults to the one that encoded.", default=None)
    file: PathLike = option("PNG to write.", default="grid.png", name="out")
    weights: Weights = option("Weights of a run.", default="ema")
    device: Device = option("auto, cpu, cuda or cuda:N.", default="auto")
