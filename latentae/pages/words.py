"""Numbers and reasons as a reader meets them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from latentae.pages.report import Notices

__all__ = ["DASH", "absent", "count", "number", "percent", "shape", "why"]

DASH = "-"  # where there is no number


def number(value: float | None, form: str = ".4g") -> str:
    """A number by a format such as ".2f"; a dash for one that is unknown or not finite."""
    return DASH if value is None or not math.isfinite(value) else format(value, form)


def percent(share: float | None) -> str:
    """0.25 -> "25 %"."""
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.3g} %"


def count(amount: int, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def shape(sides: Sequence[int]) -> str:
    """[8, 32, 32] -> "8 x 32 x 32"."""
    return " x ".join(str(side) for side in sides)


def why(item: Mapping[str, Any] | None) -> str | None:
    """Why an item of a result is not there; None if it is."""
    if item is None:
        return "it was not part of this evaluation"
    reason = item.get("missing", item.get("skipped"))
    return str(reason) if isinstance(reason, str) else None


def absent(what: str, reason: str) -> Notices:
    """What was not measured, and why."""
    return Notices([("note", f"{what}: not measured; {reason.rstrip('.')}.")])
