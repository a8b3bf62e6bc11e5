"""The model card: what the component is, how to load it, and which of its numbers were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from latentae.exporting.earlier_results import metric_text
from latentae.exporting.formats import ExportableConfig
from latentae.exporting.scaling import LatentScaling
from latentae.measures.scores import LABELS
from latentae.pages.render import DASH, render

if TYPE_CHECKING:
    from latentae.exporting.data_measurements import Quality, TilingError
    from latentae.exporting.preview import Preview
    from latentae.measures.latents.half import HalfAudit

__all__ = ["CardFacts", "card_for_hub", "model_card"]


@dataclass(frozen=True)
class CardFacts:
    """Facts that a model card states; None and empty fields were not measured or not written."""

    name: str
    """Name of the exported folder."""
    config: ExportableConfig
    scaling: LatentScaling
    parameters: int
    resolution: int
    """Image side in pixels at training, or the one in the config."""
    weights: str
    """Which weights were exported, in words."""
    version: str
    """Version of latentae."""
    formats: tuple[str, ...] = ("diffusers",)
    variant: str | None = None
    metrics: Mapping[str, str] | None = None
    """Earlier measurements: label -> text, in the order to print."""
    quality: tuple[Quality, ...] = ()
    """Measurements of the export, by resolution."""
    audit: HalfAudit | None = None
    tiling: TilingError | None = None
    preview: Preview | None = None
    ldm_notes: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    """File under training/ -> what it is."""

    def record(self) -> dict[str, Any]:
        """The same numbers for `latentae.json`, as plain JSON values."""
        scaling = {"scaling_factor": self.scaling.scaling_factor, "shift_factor": self.scaling.shift_factor}
        figures = {
            "quality": [asdict(quality) for quality in self.quality],
            "half_precision": None if self.audit is None else self.audit.to_json(),
            "tiling": None if self.tiling is None else asdict(self.tiling),
            "preview_r2": None if self.preview is None else self.preview.r2,
        }
        values = {"weights": self.weights, "parameters": self.parameters, "scaling": scaling}
        return {**values, "figures": figures} if self.quality else values


def model_card(facts: CardFacts) -> str:
    """Write the README.md of an exported folder, with the metadata that model hubs read."""
    names = list(dict.fromkeys(name for quality in facts.quality for name in quality.metrics))
    perceptual = [quality.perceptual for quality in facts.quality if quality.perceptual] or [
        "perceptual distance"
    ]
    return render(
        "card.md",
        facts=facts,
        config=facts.config,
        scaling=facts.scaling,
        kl=facts.config.class_name == "AutoencoderKL",
        quality_header=[
            "pixels",
            "images",
            *({**LABELS, "perceptual": perceptual[0]}.get(name, name) for name in names),
        ],
        quality_rows=[
            [f"{quality.resolution} x {quality.resolution}", quality.images]
            + [metric_text(quality.metrics[name]) if name in quality.metrics else DASH for name in names]
            for quality in facts.quality
        ],
    )


def card_for_hub(card: str, name: str, repository: str) -> str:
    """Replace the folder `name` by the repository where snippets accept either."""
    local = json.dumps(name, ensure_ascii=False)
    return card.replace(f"from_pretrained({local}", f'from_pretrained("{repository}"').replace(
        "OWNER/NAME", repository
    )
