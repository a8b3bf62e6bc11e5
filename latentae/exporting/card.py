"""The model card: what the component is, how to load it, and which of its numbers were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from latentae.exporting.diffusers_folder import ExportableConfig
from latentae.exporting.earlier_results import LABELS, metric_text
from latentae.exporting.scaling import LatentScaling
from latentae.exporting.snippets import snippets
from latentae.models.config import AutoencoderKLConfig

if TYPE_CHECKING:
    from latentae.exporting.data_measurements import Quality, TilingError
    from latentae.exporting.preview import Preview
    from latentae.measures.latents.half import HalfAudit

__all__ = ["CardFacts", "card_for_hub", "model_card"]

MISSING = "Not measured: export with `--data SHARDS`, or `--metrics EVALUATION`, to have figures here."


@dataclass(frozen=True)
class CardFacts:
    """All that a card says; what had to be measured was measured by whoever asks for the card."""

    name: str
    """Of the folder."""
    config: ExportableConfig
    scaling: LatentScaling
    parameters: int
    resolution: int
    """Image side in pixels at training, or what the config says."""
    weights: str
    """What was exported, in words."""
    version: str
    """Of latentae."""
    formats: tuple[str, ...] = ("diffusers",)
    variant: str | None = None
    metrics: Mapping[str, str] | None = None
    """What was measured before: label -> text, in the order to print."""
    quality: tuple[Quality, ...] = ()
    """What was measured at export, by resolution."""
    audit: HalfAudit | None = None
    tiling: TilingError | None = None
    preview: Preview | None = None
    ldm_notes: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    """Files under training/ -> what they are."""

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
    """The README.md of an exported folder, in Markdown with the metadata block that model hubs read."""
    config = facts.config
    f, z, side = config.downsampling, config.latent_channels, facts.resolution
    ratio = config.in_channels * f * f / z
    return f"""\
---
{"library_name: diffusers" if "diffusers" in facts.formats else "library_name: latentae"}
tags:
- autoencoder
- vae
- latentae
---

# {facts.name}

{_kind(config)} that turns {config.in_channels}-channel images into {z}-channel latents
at 1/{f} of their height and width, and back.

| | |
|---|---|
| Image | float, {config.in_channels} x H x W, range [-1, 1], H and W multiples of {f} |
| Latent | {z} x H/{f} x W/{f}; {z} x {side // f} x {side // f} for {side} x {side} pixels |
| Downsampling factor | {f} ({ratio:.3g} image values per latent value) |
| Made for | {side} x {side} pixels |
| Parameters | {facts.parameters:,} |
| Weights | {facts.weights} |
| Made with | latentae {facts.version} |

## Latent scaling

{_scaling(facts)}
{_by_channel(config)}{_channels(facts.scaling)}
## Use

`images`: float [B, {config.in_channels}, H, W] in [-1, 1]. Snippets read a local copy of this folder{_hub_hint(facts)}.

{snippets(facts)}
## Precision

{_precision(facts)}

## Measured quality

{_quality(facts)}

## Tiling

{_tiling(facts)}
{_previews(facts.preview)}{_training(facts.training)}
## Licence

latentae, which made this folder, is licensed under Apache-2.0. The weights are not covered by that: whoever publishes them
chooses their licence, within what the training images allow, and names it here and in the metadata above (`license: ...`). The training
images are not named in this folder; name them here too. No weights of perceptual networks (LPIPS, VGG) are part of this folder.
"""


def card_for_hub(card: str, name: str, repository: str) -> str:
    """The card of a folder called `name` with the repository where snippets may say either."""
    return card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repository}"').replace(
        "OWNER/NAME", repository
    )


def _hub_hint(facts: CardFacts) -> str:
    return f"; `hf download OWNER/NAME --local-dir {facts.name}` gets one from the Hub, and `from_pretrained` takes that name itself"


def _kind(config: ExportableConfig) -> str:
    if isinstance(config, AutoencoderKLConfig):
        return "A convolutional KL autoencoder (`AutoencoderKL`)"
    return "A deep-compression autoencoder (`AutoencoderDC`), deterministic,"


def _scaling(facts: CardFacts) -> str:
    scaling, shift = facts.scaling, f"\n| `shift_factor` | {facts.scaling.shift_factor:.6g} |"
    if not isinstance(facts.config, AutoencoderKLConfig):
        shift = ""
        what = (
            "A diffusion model sees `z * scaling_factor`; its latents go to the decoder as `latents / scaling_factor`. Where it was\n"
            "measured it is 1 / root mean square of the latents."
        )
    elif scaling.folded:
        what = (
            "The weights give and take latents that are normalised already, each channel with mean 0 and standard deviation 1 over the\n"
            "images measured. There is nothing to scale or shift: every pipeline's formula leaves them as they are."
        )
    else:
        what = (
            "A diffusion model sees `(z - shift_factor) * scaling_factor`; its latents go to the decoder as\n"
            "`latents / scaling_factor + shift_factor`."
        )
    return f"""{what}

| | |
|---|---|
| `scaling_factor` | {scaling.scaling_factor:.6g} |{shift}
| Where they come from | {scaling.origin} |"""


def _by_channel(config: ExportableConfig) -> str:
    """What a config that came with statistics by channel means, or nothing."""
    if (
        not isinstance(config, AutoencoderKLConfig)
        or config.latents_mean is None
        or config.latents_std is None
    ):
        return ""
    return (
        "\nThe config also has `latents_mean` and `latents_std`. Pipelines that read them, such as SDXL's, normalise by channel instead:\n"
        "`(z - latents_mean) * scaling_factor / latents_std`.\n"
    )


def _channels(scaling: LatentScaling) -> str:
    """The measured mean and deviation of each channel, or nothing."""
    if scaling.measured is None:
        return ""
    pairs = zip(scaling.measured.mean, scaling.measured.std, strict=True)
    rows = [f"| {channel} | {mean:.4g} | {std:.4g} |" for channel, (mean, std) in enumerate(pairs)]
    title = ["Removed by the weights:", ""] if scaling.folded else []
    return "\n".join(["", *title, "| channel | mean | standard deviation |", "|---|---|---|", *rows, ""])


def _precision(facts: CardFacts) -> str:
    weights = "The weights are fp32."
    if facts.variant is not None:
        weights = f'The weights are fp32, and once more in {facts.variant} (`from_pretrained(..., variant="{facts.variant}")`).'
    kl = facts.config if isinstance(facts.config, AutoencoderKLConfig) else None
    if facts.audit is None:
        advice = (
            "so `force_upcast` is true: pipelines run this component in fp32"
            if kl
            else "so run this component in fp32"
        )
        return f"{weights} Half-precision *activations* were not measured, {advice}."
    if kl is not None:
        verdict = (
            "true: pipelines run this component in fp32"
            if kl.force_upcast
            else "false: fp16 was measured to be safe"
        )
        verdict = f"`force_upcast` is {verdict}."
    else:
        unsafe = facts.audit.force_upcast
        verdict = "Run this component in fp32, not in fp16." if unsafe else "fp16 was measured to be safe."
    rows = [f"| {name} | {text} |" for name, text in facts.audit.rows()]
    return "\n".join([f"{weights} {verdict}", "", "| | |", "|---|---|", *rows])


def _quality(facts: CardFacts) -> str:
    parts = []
    if facts.metrics:
        parts.append(
            ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.metrics.items())]
        )
    if facts.quality:
        names = list(dict.fromkeys(name for quality in facts.quality for name in quality.metrics))
        perceptual = next(
            (quality.perceptual for quality in facts.quality if quality.perceptual), "perceptual distance"
        )
        labels = [{**LABELS, "perceptual": perceptual}.get(name, name) for name in names]
        rows = []
        for quality in facts.quality:
            cells = [metric_text(quality.metrics[name]) if name in quality.metrics else "-" for name in names]
            rows.append(
                f"| {quality.resolution} x {quality.resolution} | {quality.images} | {' | '.join(cells)} |"
            )
        head = ["Measured at export, from the posterior mean in fp32, reconstructions rounded to 8 bits:", ""]
        parts.append(
            [*head, f"| pixels | images | {' | '.join(labels)} |", "|---" * (len(names) + 2) + "|", *rows]
        )
    return "\n\n".join("\n".join(part) for part in parts) or MISSING


def _tiling(facts: CardFacts) -> str:
    error = facts.tiling
    if not isinstance(facts.config, AutoencoderKLConfig):
        return "latentae has no tiling for this kind of model; diffusers' own (`vae.enable_tiling()`) was not measured."
    if error is None:
        return "The error of tiled encoding and decoding was not measured."
    psnr = "infinite" if error.psnr is None else f"{error.psnr:.1f} dB"
    return (
        f"Blended tiles of {error.tile} pixels (`latentae.models.tiling.Tiled`) against none, encoder and decoder, over {error.images}\n"
        f"images of {error.resolution} x {error.resolution} pixels: {error.largest:.3g} at most in units of [-1, 1], PSNR {psnr}."
    )


def _previews(preview: Preview | None) -> str:
    if preview is None:
        return ""
    r2 = "not known: all images were of one colour" if preview.r2 is None else f"{preview.r2:.3f}"
    return (
        "\n## Previews\n\n`latent_preview.json` has `latent_rgb_factors` and their bias: a linear map from normalised latents to RGB, "
        f"fitted to {preview.images} images; R^2 {r2}.\n"
    )


def _training(parts: Mapping[str, str]) -> str:
    if not parts:
        return ""
    rows = [f"| {name} | {what} |" for name, what in parts.items()]
    return "\n".join(["", "## To train on", "", "| training/ | |", "|---|---|", *rows, ""])
