"""Options that several verbs share for what they measure."""

from __future__ import annotations

from typing import Literal

__all__ = ["PerceptualName"]

PerceptualName = Literal["auto", "vgg", "alex", "squeeze", "efficientnet-lite0", "none"]
