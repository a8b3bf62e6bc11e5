"""Options of the verb `quickstart`."""

from __future__ import annotations

from latentae.keyed import Seed
from latentae.options import KW_ONLY, PathLike, argument, option, table

__all__ = ["QuickstartOptions"]


@table
class QuickstartOptions:
    """Run the main job on photos that ship with the dependencies: shards, training, evaluation, latents, export, report."""

    out: PathLike = argument("Folder for everything it writes.", default="quickstart")
    _: KW_ONLY
    minutes: float = option("Minutes of training; the speed is measured first.", default=6.0)
    images: int | None = option("Images to train on, instead of minutes.", default=None)
    seed: Seed = option("Random seed of the run.", default=0)
