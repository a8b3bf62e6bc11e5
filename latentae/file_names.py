"""File names that several packages share."""

from __future__ import annotations

__all__ = [
    "BAD_SAMPLES",
    "DISCRIMINATOR",
    "EVENTS_LOG",
    "METRICS",
    "METRICS_LOG",
    "PER_IMAGE",
    "RECIPE",
    "RECORD",
    "REPORT",
    "STATISTICS",
    "SUMMARY",
]

BAD_SAMPLES = "bad_samples.jsonl"
"""Of shards and runs: the images that could not be read."""
DISCRIMINATOR = "discriminator.safetensors"
"""Of checkpoints and exports."""
EVENTS_LOG = "events.jsonl"
"""Of runs: resumes, rollbacks and the like, one a line."""
METRICS = "metrics.json"
"""Of evaluations."""
METRICS_LOG = "metrics.jsonl"
"""Of runs: the metrics of one step a line."""
PER_IMAGE = "per_image.csv"
"""Of evaluations: one row per image."""
RECIPE = "recipe.toml"
"""Of runs, checkpoints and exports: the resolved recipe."""
RECORD = "latentae.json"
"""Of every output folder: its job; in an export also where the model comes from."""
REPORT = "report.html"
"""Of evaluations and the quickstart."""
STATISTICS = "statistics.json"
"""Of encoded latents: the statistics of all shards."""
SUMMARY = "summary.html"
"""Of runs."""
