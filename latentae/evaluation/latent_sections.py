"""The latent space on a page: its channels, its spectrum, what becomes of disturbed latents, and what a diffusion model makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.pages.charts import WIDE, Bars, Curve, bar_plot, legend, line_plot
from latentae.pages.pictures import LARGEST, read_png, shown
from latentae.pages.report import (
    Beside,
    Block,
    Chart,
    Charts,
    DataTable,
    Facts,
    Folded,
    Notices,
    Paragraph,
    Picture,
    Section,
    Strip,
    Tiles,
)
from latentae.pages.words import DASH, absent, count, number, percent, shape, why

__all__ = ["diffusability_sections", "latent_sections"]

ACTIVE = 0.01  # variance of a posterior mean above which a channel counts as active
FEW_CHANNELS = 16  # longer tables are folded
LABELS = {  # of pictures of generated images
    "samples": "Sampled by the tiny flow, decoded",
    "flow": "Sampled by the tiny flow, decoded",
    "interpolated": "Half way between neighbours, decoded",
}
STRIP = 9 * 128  # pixels across an interpolation, at most


def latent_sections(folder: Path, result: Mapping[str, Any]) -> list[Section]:
    """What the latents are like, and what happens to an image whose latent is disturbed."""
    latent, diagnostics = result["latent"], result.get("diagnostics")
    sections = [
        Section(
            "The latent space",
            [*_overview(latent), *_channels(latent), *_spectrum(latent), *_probe(latent), *_details(latent)],
        )
    ]
    if diagnostics is None:
        return sections
    blocks = [
        *_strip(folder, diagnostics.get("interpolation")),
        *_disturbed(diagnostics),
        *_half(diagnostics.get("half")),
    ]
    return [*sections, Section("Disturbed latents", blocks)]


def _overview(latent: Mapping[str, Any]) -> list[Block]:
    channels, scale, kl = latent["shape"][0], latent["scaling_factor"], latent["kl_nats_per_image"]
    tiles = [
        (
            "scaling_factor",
            number(scale, ".5g"),
            "1 / std over all elements" if scale is not None else "none: the latent is constant",
        ),
        ("KL to a standard normal", number(kl, ",.0f" if (kl or 0) >= 1000 else ".4g"), "nats an image"),
    ]
    if latent.get("effective_rank") is not None:
        note = f"of {channels} channels, by the entropy of the covariance's eigenvalues"
        tiles.insert(0, ("effective rank", number(latent["effective_rank"], ".3g"), note))
    if latent.get("active_units") is not None:
        tiles.insert(
            1,
            (
                "active channels",
                f"{latent['active_units']} of {channels}",
                f"variance of the posterior mean above {ACTIVE:g}",
            ),
        )
    share = (latent.get("spectrum") or {}).get("high_frequency_share")
    if share:
        tiles.append(
            (
                "fine detail",
                percent(share["latent"]),
                f"of the latent's power; the shrunk image has {percent(share['image'])}",
            )
        )
    return [Tiles(tiles)]


def _channels(latent: Mapping[str, Any]) -> list[Block]:
    """A chart for each number of the channels, and the table."""
    spread = [
        Bars("of the latent", latent["channel_std"], 0),
        Bars("of the posterior", latent["channel_posterior_std"], 1),
    ]
    charts = [
        Chart(bar_plot([Bars("", latent["channel_mean"])], "mean of each channel", x="channel"), "Mean"),
        Chart(
            bar_plot(spread, "standard deviation of each channel", x="channel"),
            "Standard deviation",
            legend(spread),
        ),
    ]
    if latent.get("kl_nats_per_channel"):
        svg = bar_plot(
            [Bars("", latent["kl_nats_per_channel"])], "KL of each channel", x="channel", y="nats an image"
        )
        charts.append(Chart(svg, "KL to a standard normal"))
    if latent.get("channel_mean_variance"):
        bars, level = [Bars("", latent["channel_mean_variance"], 2)], (ACTIVE, "")
        svg = bar_plot(bars, "variance of each posterior mean", x="channel", log=True, level=level)
        charts.append(Chart(svg, "Variance of the posterior mean; active above the line"))
    table = _channel_table(latent)
    folded = latent["shape"][0] > FEW_CHANNELS
    return [
        Charts(charts),
        Folded(f"The numbers of all {latent['shape'][0]} channels", [table]) if folded else table,
    ]


def _channel_table(latent: Mapping[str, Any]) -> DataTable:
    columns = {
        "mean": latent["channel_mean"],
        "std": latent["channel_std"],
        "posterior std": latent["channel_posterior_std"],
        "KL (nats)": latent.get("kl_nats_per_channel"),
    }
    columns = {name: values for name, values in columns.items() if values is not None}
    rows = [
        [(str(channel), ""), *((number(value), "") for value in values)]
        for channel, values in enumerate(zip(*columns.values(), strict=True))
    ]
    return DataTable(["channel", *columns], rows, dense=True)


def _spectrum(latent: Mapping[str, Any]) -> list[Block]:
    if "spectrum" not in latent:
        return []
    spectrum = latent["spectrum"]
    if spectrum is None:
        return [absent("Spectrum", "there is none of latents smaller than 4 x 4, or that do not vary")]
    curves = [
        Curve(
            "latent, channels of equal weight",
            list(zip(spectrum["frequency"], spectrum["latent"], strict=True)),
        ),
        Curve(
            "image, shrunk to the latent's size",
            list(zip(spectrum["frequency"], spectrum["image"], strict=True)),
            1,
            strong=False,
        ),
    ]
    svg = line_plot(
        curves, "spectrum", x="cycles per latent pixel", y="share of power", log_y=True, size=WIDE
    )
    text = (
        "Power by frequency, from broad shapes (left) to the finest detail (right); noise is flat, photos fall off. A latent much "
        "flatter than its images asks a diffusion model for detail that nobody sees."
    )
    return [Beside([Charts([Chart(svg, "Radial power spectrum (DCT)", legend(curves))])], [Paragraph(text)])]


def _probe(latent: Mapping[str, Any]) -> list[Block]:
    if "probe" not in latent:
        return []
    probe = latent["probe"]
    if (reason := why(probe)) is not None or probe is None:
        return [absent("Linear probe", reason or "")]
    tested, classes = count(probe["tested_on"], "image"), probe["classes"]
    text = (
        f"Linear probe: a linear classifier on {probe['features']:,} features of the latent tells {classes} classes apart with "
        f"{percent(probe['accuracy'])} accuracy on {tested} that it was not fitted on (always naming the most frequent class: "
        f"{percent(probe.get('most_frequent_class'))}; on those it was fitted on: {percent(probe.get('training_accuracy'))})."
    )
    by_class = probe.get("by_class") or {}
    ordered = sorted(by_class.items(), key=lambda item: -item[1])
    table = DataTable(
        ["class", "accuracy"], [[(name, ""), (percent(value), "")] for name, value in ordered], dense=True
    )
    return [Paragraph(text), *([Folded("Accuracy by class", [table])] if ordered else [])]


def _details(latent: Mapping[str, Any]) -> list[Block]:
    facts = [
        ("shape", shape(latent["shape"])),
        ("numbers per pixel", number(latent["floats_per_pixel"])),
        (
            "suggested scaling_factor",
            number(latent["scaling_factor"], ".5g")
            if latent["scaling_factor"]
            else "none: the latent is constant",
        ),
        ("suggested shift_factor", number(latent["shift_factor"], ".5g")),
        ("mean and std, all channels", f"{number(latent['mean'])} and {number(latent['std'])}"),
        ("largest |posterior mean|", number(latent["largest_absolute_mean"])),
    ]
    text = (
        "A diffusion model is given (latent - shift_factor) x scaling_factor. The posterior std says how much noise the "
        "encoder adds itself."
    )
    return [Paragraph(text), Facts(facts)]


def _strip(folder: Path, found: Mapping[str, Any] | None) -> list[Block]:
    reason = why(found)
    if found is None or reason is not None or "file" not in found:
        return [absent("Interpolation", reason or "there is no picture of it")]
    a, b = found["keys"]
    detail = f"{a} to {b}, {found['steps']} steps, {found['mode']}"
    return [Strip(Picture(shown(read_png(folder / found["file"]), STRIP), "Between two images", detail))]


def _disturbed(diagnostics: Mapping[str, Any]) -> Iterator[Block]:
    if diagnostics.get("images"):
        yield Paragraph(f"Measured on {count(diagnostics['images'], 'image')}, spread evenly over the data.")
    transforms, noises = diagnostics.get("equivariance") or [], diagnostics.get("sensitivity") or []
    left = [*_equivariance(transforms)]
    right = [*_sensitivity(noises)]
    yield Beside(left, right)


def _equivariance(found: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    if not found:
        yield absent("Equivariance", why(None) or "")
        return
    rows = []
    for item in found:
        reason = why(item)
        psnr = (number(item.get("decoder_psnr"), ".2f"), reason or "")
        rows.append([(item["transform"], ""), (number(item.get("encoder_error"), ".3g"), ""), psnr])
    caption = (
        "Encoder: squared distance of the transformed image's latent to the transformed latent, by the latent's variance (0 is perfect, "
        "1 is no better than the mean). Decoder: PSNR of a decoded transformed latent against the transformed image."
    )
    yield DataTable(
        ["transform", "encoder error ↓", "decoder PSNR (dB) ↑"], rows, caption=caption, dense=True
    )


def _sensitivity(found: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    known = [item for item in found if item.get("psnr") is not None]
    if not known:
        yield absent("Noise on the latent", why(found[0] if found else None) or "no image has a finite PSNR")
        return
    start = next((item["psnr"] + item["drop"] for item in known if item.get("drop") is not None), None)
    points = [
        *([(0.0, start)] if start is not None else []),
        *((item["noise"], item["psnr"]) for item in known),
    ]
    svg = line_plot(
        [Curve("", points)], "PSNR with noise on the latent", x="noise, in stds of the latent", y="PSNR (dB)"
    )
    rows = [
        [(f"{item['noise']:g}", ""), (number(item["psnr"], ".2f"), ""), (number(item.get("drop"), ".2f"), "")]
        for item in known
    ]
    yield Charts([Chart(svg, "Noise on the latent")])
    yield DataTable(["noise", "PSNR (dB)", "drop (dB)"], rows, dense=True)


def _half(half: Mapping[str, Any] | None) -> list[Block]:
    reason = why(half)
    if half is None or reason is not None:
        return [absent("Half precision", reason or "")]
    obstacle, largest = half.get("obstacle"), half.get("largest") or {}
    where = f"{largest.get('stage')} of the {largest.get('coder')}" if largest else ""
    verdict = (
        ("bad", f"Not safe in fp16: {obstacle}.")
        if obstacle
        else (
            "good",
            f"Safe in fp16: activations stay below {number(largest.get('activation'))} (the largest is in {where}).",
        )
    )
    rows = [
        [
            (name, ""),
            ("yes" if run["finite"] else "no", ""),
            (
                "no difference"
                if run["finite"] and run["image_psnr"] is None
                else number(run["image_psnr"], ".1f"),
                "",
            ),
            (number(run["image_max_abs"], ".2g"), ""),
            (number(run["latent_max_abs"], ".2g"), ""),
        ]
        for name, run in (half.get("runs") or {}).items()
    ]
    header = [
        "precision",
        "finite",
        "PSNR to fp32 (dB)",
        "largest difference, image",
        "largest difference, latent",
    ]
    blocks: list[Block] = [Notices([verdict]), DataTable(header, rows)]
    maxima = half.get("activation_maxima") or {}
    return [*blocks, *([Charts(_maxima(maxima, half.get("fp16_max")))] if maxima else [])]


def _maxima(maxima: Mapping[str, Mapping[str, float | None]], limit: float | None) -> list[Chart]:
    charts = []
    for color, (coder, stages) in enumerate(maxima.items()):
        svg = bar_plot(
            [Bars("", list(stages.values()), color)],
            f"largest activations of the {coder}",
            names=list(stages),
            log=True,
            level=(limit, "fp16 ends") if limit else None,
            lying=True,
            size=(4.2, 0.9 + 0.22 * len(stages)),
        )
        charts.append(Chart(svg, f"Largest activations: {coder}"))
    return charts


def diffusability_sections(folder: Path, found: Mapping[str, Any] | None) -> list[Section]:
    """What simple generators make of the latent space; none where it was not asked for."""
    if found is None:
        return []
    title, reason = "Generating from the latent space", why(found)
    if reason is not None:
        return [Section(title, [absent("Diffusability", reason)])]
    extractor, flow, interpolated = found["extractor"], found.get("flow"), found.get("interpolated")
    tiles, notices = [], []
    if flow is not None and why(flow) is None:
        distance, values = flow["frechet"], ", ".join(number(value) for value in flow["frechet"]["values"])
        note = f"{extractor}; seeds: {values}"
        tiles.append(("tiny flow ↓", f"{number(distance['mean'])} ± {number(distance['std'], '.2g')}", note))
    else:
        notices.append(absent("Tiny flow", why(flow) or ""))
    if interpolated is not None and why(interpolated) is None:
        note = f"{extractor}; with one of {interpolated['neighbours']} nearest of {interpolated['from']}"
        tiles.append(("between neighbours ↓", number(interpolated["frechet"]), note))
    else:
        notices.append(absent("Interpolation between neighbours", why(interpolated) or ""))
    pictures = [
        Strip(
            Picture(
                shown(read_png(folder / file), 2 * LARGEST),
                LABELS.get(str(name), str(name).replace("_", " ")),
            ),
            fit=True,
        )
        for name, file in (found.get("files") or {}).items()
    ]
    facts = [("images", f"{found['images']:,}")] if found.get("images") else []
    if flow is not None and why(flow) is None:
        facts += [
            (
                "flow",
                f"{flow['parameters']:,} parameters, {flow['steps']:,} steps of {flow['batch']} latents",
            ),
            (
                "last loss of each seed",
                ", ".join(number(value) for value in (flow.get("loss") or {}).get("values", [])) or DASH,
            ),
        ]
    limits = [Paragraph(found["limits"])] if found.get("limits") else []
    return [Section(title, [Tiles(tiles), *notices, *pictures, *limits, Facts(facts)])]
