"""Options of the verb `quickstart`."""

from __future__ import annotations

from latentae.keyed import Seed
from latentae.options import KW_ONLY, PathLike, argument, option, table

__all__ = ["QuickstartOptions"]


@table
class QuickstartOptions:
    """Try everything on photos that ship with the dependencies. Ends with a report."""

    out: PathLike = argument("Output folder.", default="quickstart")
    _: KW_ONLY
    minutes: float = option(
        "Minutes of training; the speed is measured first.", default=6.0, gt=0, lt=100_000
    )
    images: int | None = option("Number of images to train on, instead of minutes.", default=None, ge=1)
    seed: Seed = option("Random seed of the run.", default=0)
