"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Device", "MaxPixels", "Model", "Shards", "Weights"]

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="Run, checkpoint, exported folder, file of weights, or owner/name on the Hub."
    ),
]
Shards = Annotated[
    str, typer.Argument(metavar="SHARDS", help="Folder, file, glob or brace pattern ({000..099}.tar).")
]
Weights = Annotated[str, typer.Option(help="Which weights of a run: ema or raw.")]
MaxPixels = Annotated[
    int,
    typer.Option(
        min=1,
        help="Refuse images of more pixels by their header. Raise it for photos of 108 or 200 megapixels.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
