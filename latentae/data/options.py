"""What a recipe says about its data."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["DataOptions"]


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
        default=0.02, gt=0, lt=1, description="Share of the samples that validation 'auto' holds out, from 0 to 1."
    )
    resolution: int = Field(default=256, ge=8, description="Side of the square crops in pixels.")
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
    shuffle_buffer: int = Field(
        default=1000,
        ge=1,
        description="Samples held in memory to shuffle from, in each worker, still encoded; 1 keeps the order inside a shard.",
    )
    workers: int = Field(
        default=0, ge=0, description="Processes that decode images, for each rank; 0 decodes in the training process."
    )
    cache_mb: int = Field(
        default=512,
        ge=0,
        description="Memory for decoded images kept from one epoch to the next, in MB for each rank; 0 decodes every time.",
    )

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} is above scale_max {self.scale_max}; give a range from small to large")
        return self
