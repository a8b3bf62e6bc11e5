"""The verb `encode`: shards of images -> shards of latents, one for one, on as many machines as there are.

Every task takes each num_tasks-th shard and never waits for another. What is done is what has a valid sidecar; whichever task
finds all of them in place writes `statistics.json` and closes the job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.index import load_index
from latentae.data.shards import expand_shards
from latentae.data.sources import is_remote, shown
from latentae.data.transforms import to_float
from latentae.device import choose_device
from latentae.encoding.plan import Shard, plan_digest, plan_shards, remove_leftovers, resolve_task
from latentae.encoding.shard import DTYPES, ShardSettings, encode_shard
from latentae.encoding.sidecar import FORMAT_VERSION, STATISTICS
from latentae.errors import DataError, ImageError, ModelError, OutputError, RecipeError, ShardError
from latentae.files import read_json, write_json
from latentae.jobs import Job
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.latent_statistics import LatentStatistics, merge
from latentae.models.pretrained import ModelSource, load_model, resolve_model
from latentae.progress import Progress, say

__all__ = ["ModelEncoder", "encode"]

PREPROCESSING = "short side to the resolution (antialiased bicubic), centre crop"
STALE_SECONDS = 600.0  # a writer touches its file with every batch


def encode(
    model: str | Path,
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    dtype: str = "bf16",
    resolution: int | None = None,
    batch_size: int = 16,
    keep_images: bool = False,
    task_id: int | None = None,
    num_tasks: int | None = None,
    weights: str = "ema",
    device: str = "auto",
) -> dict[str, Any]:
    """Encode image shards to latent shards; running the same command again goes on where it stopped, or says it is done.

    Args:
        model: run folder, checkpoint, exported folder or safetensors file.
        shards: folder, tar, glob, brace pattern, or several.
        out: folder for the latents; shards keep their names, and their folders below the deepest one they share.
        dtype: stored type of mean and logvar: bf16, fp16 or fp32. The posterior is computed in fp32.
        resolution: side in pixels of the encoded centre square; the one the model was trained at if not given.
        batch_size: images at once; another one may change the last bits.
        keep_images: copy the images into the latent shards too.
        task_id: which share of the shards to encode, from 0.
        num_tasks: how many shares there are. Where neither is given, they are RANK and WORLD_SIZE (accelerate launch, torchrun),
            else those of a SLURM array, else 0 and 1.
        weights: "ema" or "raw" weights of a run.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".

    Returns:
        A summary: `out`, `shards`, `samples`, `skipped`, `finished` (False while other tasks have shards to do), and once
        finished the statistics (see LatentStatistics.summary).

    Raises:
        RecipeError: an option that is not allowed.
        DataError: shards that are missing, damaged or hold an unreadable image (shard and key are named).
        ModelError: no such model, or not one of RGB images.
        OutputError: `out` can't be written or holds another job, such as that of another model, resolution or dtype.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise RecipeError(f"batch size is {batch_size}, expected at least 1")
    task, tasks = resolve_task(task_id, num_tasks)
    source = resolve_model(model, weights)
    side = _resolution(source, resolution)
    where = choose_device(device)
    out = Path(out)
    index = load_index(_local(expand_shards(shards)))
    plan = plan_shards(index, out)

    identity = _identity(source, side, where, dtype, keep_images)
    fingerprint = hashlib.sha256(json.dumps([FORMAT_VERSION, identity]).encode()).hexdigest()
    settings = ShardSettings(side, dtype, batch_size, keep_images, source.config.latent_channels, fingerprint)
    inputs = {**identity, "shards": {"count": len(plan), "samples": index.samples, "digest": plan_digest(plan)}}
    job = Job.open(out, "encode", inputs)

    mine = plan[task::tasks]
    pending = [shard for shard in mine if shard.finished(settings.fingerprint) is None]
    if pending:
        autoencoder, _ = load_model(source.weights_file, device=where)  # not source.path: a run may have moved on
        encoder = ModelEncoder(autoencoder, where, identity["compute"])
        _run(encoder, pending, sum(shard.samples for shard in mine), settings)
    return _conclude(job, plan, settings, source, f"task {task} of {tasks}" if tasks > 1 else "", bool(pending))


def _identity(source: ModelSource, side: int, device: torch.device, dtype: str, keep_images: bool) -> dict[str, Any]:
    """What decides the bytes of a latent shard, besides the images."""
    return {
        "model": source.fingerprint,
        "resolution": side,
        "preprocessing": PREPROCESSING,
        "compute": "bf16" if device.type == "cuda" else "fp32",
        "dtype": dtype,
        "keep_images": keep_images,
    }


def _local(shards: list[str]) -> list[str]:
    remote = next((path for path in shards if is_remote(path)), None)
    if remote is not None:
        raise DataError(f"encode reads local shards only so far, found {shown(remote)}; copy the shards to a folder first")
    return shards


def _run(encoder: ModelEncoder, pending: list[Shard], total: int, settings: ShardSettings) -> None:
    """Encode the `pending` shards; `total` counts the samples of all shards of this task."""
    done = total - sum(shard.samples for shard in pending)
    if done:
        say(f"encode: {done} of {total} samples are already done")
    with Progress("encoding", total=total, initial=done) as progress:
        for shard in pending:
            remove_leftovers(shard.output, older_than=STALE_SECONDS)
            try:
                sidecar = encode_shard(shard.source, shard.output, shard.name, encoder, settings, progress.advance)
            except OutputError:
                sidecar = shard.finished(settings.fingerprint)
                if sidecar is None:  # else another task did the same shard, and cleaned up
                    raise
            if sidecar.input.bytes != shard.bytes:
                raise ShardError(f"{shard.source} changed while it was encoded; run the same command again once it is complete")
            for reason, keys in sidecar.skipped.items():
                some = ", ".join(keys[:5]) + (" ..." if len(keys) > 5 else "")
                say(f"encode: {shard.name}: skipped {len(keys)} with a {reason}: {some}")


def _conclude(
    job: Job, plan: list[Shard], settings: ShardSettings, source: ModelSource, task: str, worked: bool
) -> dict[str, Any]:
    """Merge the statistics if all shards are in place, and say where the job stands."""
    sidecars = [shard.finished(settings.fingerprint) for shard in plan]
    done = [sidecar for sidecar in sidecars if sidecar is not None]
    summary: dict[str, Any] = {
        "out": str(job.folder),
        "shards": len(done),
        "samples": sum(sidecar.output.samples for sidecar in done),
        "skipped": sum(len(keys) for sidecar in done for keys in sidecar.skipped.values()),
        "finished": len(done) == len(plan),
    }
    if len(done) < len(plan):
        say(f"encode: {task} is done; {len(done)} of {len(plan)} shards are in place, the last task writes {STATISTICS}")
        return summary
    statistics = merge((LatentStatistics.from_json(sidecar.statistics) for sidecar in done), settings.channels)
    record = {
        "format_version": FORMAT_VERSION,
        "model": source.fingerprint,
        "fingerprint": settings.fingerprint,
        "resolution": settings.resolution,
        "dtype": settings.dtype,
        "skipped": summary["skipped"],
        **statistics.summary(),
        "merged": statistics.to_json(),
    }
    if worked or job.state != "finished" or not _holds(job.folder / STATISTICS, record):
        for shard in plan:
            remove_leftovers(shard.output)
        write_json(job.folder / STATISTICS, record)
        job.finish(samples=summary["samples"], skipped=summary["skipped"])
        say(f"encode: {summary['samples']} latents in {len(done)} shards, {summary['skipped']} skipped, in {job.folder}")
    else:
        say(f"encode: {job.folder} is already finished, {summary['samples']} latents in {len(done)} shards; nothing to do")
    return {**summary, **statistics.summary()}


def _holds(path: Path, value: Any) -> bool:
    try:
        return read_json(path) == value
    except (OSError, ValueError):
        return False


class ModelEncoder:
    """uint8 images -> mean and logvar, fp32 on the CPU.

    Args:
        model: on `device`.
        device: where to compute.
        compute: "fp32", or "bf16" for autocast; the posterior is fp32 either way.
    """

    def __init__(self, model: AutoencoderKL, device: torch.device, compute: str = "fp32") -> None:
        self.model, self.device, self.half = model, device, compute == "bf16"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, 3, R, R] -> mean, logvar [B, z, h, w]; rows that bf16 can't hold are computed again in fp32."""
        pixels = to_float(images.to(self.device)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            mean, logvar = self._moments(pixels)
        bad = ~(mean.isfinite() & logvar.isfinite()).flatten(1).all(1)
        if self.half and bad.any():
            again = self._moments(pixels)
            mean[bad], logvar[bad] = again[0][bad], again[1][bad]
        return mean, logvar

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(pixels)
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()


def _resolution(source: ModelSource, resolution: int | None) -> int:
    """The side to encode at, once it is sure that the model can."""
    side, factor = source.resolution if resolution is None else resolution, source.config.downsampling
    if source.config.in_channels != 3:
        raise ModelError(f"{source.path} takes {source.config.in_channels}-channel images; encode reads RGB, which has 3")
    if side < factor or side % factor:
        raise ImageError(f"resolution is {side}, expected a multiple of the model's downsampling factor {factor}")
    return side
