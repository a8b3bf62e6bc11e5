"""Latents in the layouts that other trainers read. One module a trainer, by its name; `write` is the only door.

lightningdit   samples, raw; with those of mirrored images, labels and statistics
edm2           mean and standard deviation
repa           mean and standard deviation, beside the images
mar            mean and log-variance, also of mirrored images; a folder for each class
fastdit        samples times the scaling factor
kohya          samples, raw; beside images and captions
"""

from __future__ import annotations

from latentae.encoding.formats.write import FORMATS, write

__all__ = ["FORMATS", "write"]
