"""What a recipe says about its data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from latentae.data.headers import MAX_PIXELS

__all__ = ["MAX_SEED", "DataOptions"]

MAX_SEED = 2**63 - 1  # torch's generators take 64 bits, and a training also begins one from the seed plus one


class DataOptions(BaseModel):
    """The `[data]` table of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: str | None = Field(
        default=None,
        description="Shards to train on: a folder, file, glob or brace pattern, several joined by '::'; or a folder of images.",
    )
    validation: str = Field(
        default="auto",
        description="Held-out images: 'auto' (a slice by sample key, left out of training), 'none', or shards of their own.",
    )
    validation_fraction: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="Share of the samples that validation 'auto' holds out, from 0 to 1.",
    )
    resolution: int = Field(default=256, ge=8, description="Side of the square crops in pixels.")
    crop: Literal["random", "center", "random-resized"] = Field(
        default="random",
        description="'random' squares of scale_min to scale_max, the 'center' square, or 'random-resized' (8 to 100 % of the area).",
    )
    scale_min: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Smallest crop before resizing, as a share of the short side; at least `resolution` px: 0 is native scale.",
    )
    scale_max: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Largest crop before resizing, as a share of the short side; the share is drawn log-uniformly for each crop.",
    )
    flip: bool = Field(default=True, description="Mirror every other crop left to right.")
    index: str | None = Field(
        default=None,
        description="Folder of the shards' indexes, where they are not beside the shards (see `latentae index`).",
    )
    pad: bool = Field(
        default=False,
        description="Fill an epoch's last global batch from the next epoch, rather than leave its samples out.",
    )
    channels: Literal[1, 3, 4] = Field(
        default=3, description="Channels of the images: 1 (gray), 3 (RGB) or 4 (RGB and alpha)."
    )
    bits: Literal[8, 16] = Field(default=8, description="Bits of a channel that are kept in decoding.")
    buckets: Literal["none", "auto"] = Field(
        default="none",
        description="'auto' makes batches of one aspect ratio each, with about resolution^2 pixels; 'none' crops squares.",
    )
    bucket_step: int = Field(
        default=64, ge=8, description="Sides of aspect-ratio buckets are multiples of so many pixels."
    )
    bucket_max_ratio: float = Field(
        default=2.0, ge=1, description="Largest ratio of a bucket's long side to its short side."
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        description="Refuse images of more pixels by their header, as decompression bombs; JPEGs above 80 million are decoded at "
        "1/2, 1/4 or 1/8 where the crop is a quarter of that or smaller.",
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Stop when more than this share of the images can't be read; a few are replaced.",
    )
    max_bad_in_a_row: int = Field(
        default=32, ge=1, description="Stop when so many images in a row can't be read."
    )
    workers: int = Field(
        default=0,
        ge=0,
        description="Processes that decode images, for each rank; 0 decodes in the training process.",
    )
    cache_mb: int = Field(
        default=512,
        ge=0,
        description="Memory for decoded images kept from one epoch to the next, in MB for each rank; 0 decodes every time.",
    )

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(
                f"scale_min {self.scale_min} is above scale_max {self.scale_max}; give a range from small to large"
            )
        return self

    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each aspect-ratio bucket; none where images are cropped square."""
        if self.buckets == "none":
            return ()
        from latentae.data.buckets import default_buckets

        return tuple(default_buckets(self.resolution, self.bucket_step, self.bucket_max_ratio))
