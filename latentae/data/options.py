"""The `[data]` table of a recipe, and the option tables of `shards`, `index` and `order`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from latentae.data.headers import MAX_PIXELS
from latentae.keyed import Seed
from latentae.options import KW_ONLY, Device, Inputs, PathLike, Weights, argument, option, table

__all__ = [
    "IMAGES",
    "MAX_PIXELS_HELP",
    "MODEL",
    "SHARDS",
    "DataOptions",
    "ImageOptions",
    "IndexOptions",
    "OrderOptions",
    "ShardsOptions",
]

MODEL = "Run, checkpoint, exported folder, weight file, or owner/name on the Hub."
SHARDS = "Folder, file, glob, brace pattern ({000..099}.tar) or URL of image shards."
IMAGES = "Folder of images, image files, or shards (folder, file, glob, brace pattern or URL)."
MAX_PIXELS_HELP = (
    "Refuse images of more pixels by their header. Raise it for photos of 108 or 200 megapixels."
)


class DataOptions(BaseModel):
    """The `[data]` table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: str | None = Field(
        default=None,
        description="Folder of images, or shards: folder, file, glob or brace pattern, joined by '::'.",
    )
    validation: str = Field(
        default="auto",
        description="Held-out images: 'auto' (a slice by sample key), 'none', or separate shards.",
    )
    validation_fraction: float = Field(
        default=0.02, gt=0, lt=1, description="Share of the samples that validation 'auto' holds out."
    )
    resolution: int = Field(default=256, ge=8, description="Side of the square crops in pixels.")
    crop: Literal["random", "center", "random-resized"] = Field(
        default="random",
        description="'random' squares of scale_min to scale_max, the 'center' square, or 'random-resized' "
        "rectangles of 8 to 100 % of the area.",
    )
    scale_min: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Smallest crop as a share of the short side (at least `resolution` px); 0: native scale.",
    )
    scale_max: float = Field(
        default=1.0, ge=0, le=1, description="Largest crop as a share of the short side, drawn log-uniformly."
    )
    flip: bool = Field(default=True, description="Flip crops left to right half of the time.")
    index: str | None = Field(
        default=None, description="Folder of the indexes; defaults to the folder of the shards."
    )
    pad: bool = Field(default=False, description="Fill an epoch's last batch from the next epoch.")
    channels: Literal[1, 3, 4] = Field(default=3, description="Channels: 1 (gray), 3 (RGB) or 4 (RGBA).")
    bits: Literal[8, 16] = Field(default=8, description="Bits per channel of decoded images.")
    buckets: Literal["none", "auto"] = Field(
        default="none",
        description="'auto' batches by aspect ratio, with about resolution^2 pixels; 'none' crops squares.",
    )
    bucket_step: int = Field(default=64, ge=8, description="Bucket sides are multiples of this, in pixels.")
    bucket_max_ratio: float = Field(default=2.0, ge=1, description="Largest ratio of a bucket's sides.")
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        description="Refuse images of more pixels by their header. JPEGs above 80 million pixels are decoded "
        "at 1/2, 1/4 or 1/8 if the crop is at most a quarter of that.",
    )
    max_bad_share: float = Field(
        default=0.01, ge=0, le=1, description="Stop when a larger share is unreadable; a few are replaced."
    )
    max_bad_in_a_row: int = Field(
        default=32, ge=1, description="Stop after this many unreadable images in a row."
    )
    workers: int = Field(
        default=0, ge=0, description="Decoding processes per rank; 0 decodes in the training process."
    )
    cache_mb: int = Field(
        default=512, ge=0, description="MB per rank for decoded images, reused in later epochs; 0 is none."
    )

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        low, high = self.scale_min, self.scale_max
        if low > high:
            raise ValueError(f"scale_min {low} is above scale_max {high}; give a range from small to large")
        return self


@table
class ImageOptions:
    """Options of every verb that runs a model on images."""

    _: KW_ONLY
    weights: Weights = option("Weights of a run.", default="ema")
    device: Device = option("auto, cpu, cuda or cuda:N.", default="auto")
    max_pixels: int = option(MAX_PIXELS_HELP, default=MAX_PIXELS, ge=1)


@table
class ShardsOptions:
    """Pack images into WebDataset shards. Run the same command again to resume."""

    images: PathLike = argument(
        "Folder of images, searched recursively; a Hugging Face dataset (its folder, or hf://NAME:SPLIT); or "
        "sklearn:digits, sklearn:binary-digits or skimage:photos, optionally with :held-out."
    )
    out: PathLike = argument("Folder for the shards.")
    _: KW_ONLY
    shard_size: int | None = option(
        "Maximum samples per shard. By default 16 to 1000, for at least 8 shards.",
        default=None,
        ge=1,
        identity=True,
    )
    max_shard_mb: float = option(
        "Maximum MB per shard, before resizing.", default=1000.0, gt=0, identity=True
    )
    resize: int | None = option(
        "Shrink images to this short side in pixels. By default files are copied.",
        default=None,
        ge=1,
        identity=True,
    )
    quality: int | None = option(
        "JPEG quality of shrunk images; by default they are PNGs.", default=None, ge=1, le=100, identity=True
    )
    skip_bad: bool = option(
        "Skip unreadable images and list them in bad_samples.jsonl, instead of stopping.", default=False
    )
    workers: int | None = option(
        "Threads that read images; defaults to one per core, at most 16.", default=None, ge=1
    )
    max_pixels: int = option(MAX_PIXELS_HELP, default=MAX_PIXELS, ge=1)


@table
class IndexOptions:
    """Index shards for training: sample offsets, image sizes, SHA-256.

    Lists damaged shards and fails if there are any.
    """

    shards: Inputs = argument(SHARDS)
    out: PathLike | None = argument(
        "Folder for the indexes; defaults to the folder of each shard.", default=None, metavar="[OUT]"
    )
    _: KW_ONLY
    workers: int | None = option(
        "Shards read in parallel; defaults to one per core, at least 4 for remote shards.", default=None, ge=1
    )
    verify: bool = option("Also read shards that have an index, and compare their SHA-256.", default=False)


@table
class OrderOptions:
    """Print the training order, `step<TAB>key`, without reading images."""

    shards: Inputs = argument(SHARDS)
    _: KW_ONLY
    seed: Seed = option("Random seed of the run.", default=0)
    epoch: int = option("Epoch, from 0.", default=0, ge=0)
    global_batch: int = option("Samples per step over all ranks.", default=16, ge=1)
    world_size: int = option("Number of ranks.", default=1, ge=1)
    rank: int = option("Rank whose samples are listed, from 0.", default=0, ge=0)
    workers: int = option("Data workers per rank; they do not change the order.", default=0, ge=0)
    start: int = option("First step, counted from the start of the epoch.", default=0, ge=0)
    limit: int | None = option("Maximum number of steps.", default=None)
    pad: bool = option("Fill the last batch from the next epoch.", default=False)
    held_out: float = option(
        "Share of the samples held out by key; training holds out 0.02 by default.", default=0.0, ge=0, le=1
    )
    index: PathLike | None = option(
        "Folder of the indexes; defaults to the folder of the shards.", default=None
    )
