"""The verb `encode`: shards of images -> shards of latents, one for one, on as many machines as there are.

Every task takes each num_tasks-th shard and never waits for another. What is done is what has a valid sidecar; whichever task
finds all of them in place writes `statistics.json` and closes the job. `prepare` and `conclude` are its beginning and its end, for
an engine that does what lies between in another way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentae.data.options import DataOptions
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import ShardEntry, ShardIndex, load_index
from latentae.data.sources import is_remote, name_of, sizes_of
from latentae.device import choose_device
from latentae.encoding.encoders import Encoder, ModelEncoder, build_encoder
from latentae.encoding.options import EncodeOptions
from latentae.encoding.pipeline import default_workers
from latentae.encoding.places import has_label
from latentae.encoding.plan import Shard, find_finished, plan_digest, plan_shards, remove_leftovers
from latentae.encoding.shard import UNREADABLE, ShardSettings, encode_shards
from latentae.encoding.sidecar import FORMAT_VERSION, Sidecar, sidecar_name
from latentae.encoding.store import Store
from latentae.errors import ImageError, RecipeError
from latentae.file_names import STATISTICS
from latentae.files import json_bytes
from latentae.jobs import Job, RemoteJob, resolve_task
from latentae.models.latent_statistics import LatentStatistics
from latentae.models.pretrained import ModelSource, resolve_model
from latentae.options import identity, verb
from latentae.progress import Progress, say

__all__ = ["ModelEncoder", "Work", "conclude", "encode", "prepare"]

PREPROCESSING = "resized to cover the bucket (antialiased bicubic), centre crop"
COMPUTE = ("auto", "fp32", "bf16")
ENGINES = ("local", "ray")
# formats of other trainers
NEED_FLIPS, NEED_IMAGES, TAKE_BUCKETS = ("lightningdit", "mar"), ("repa",), ("kohya",)
NEED_LABELS = ("lightningdit", "edm2", "repa", "mar")


@dataclass(frozen=True)
class Work:
    """A job that has been claimed, and this task's share of it."""

    job: Job | RemoteJob
    store: Store
    plan: list[Shard]
    """All shards of the job."""
    mine: list[Shard]
    """Those of this task."""
    pending: list[Shard]
    """Those of this task that are not done."""
    settings: ShardSettings
    source: ModelSource
    make_encoder: Callable[[], Encoder]
    """Loads the model; can be pickled and called in another process, which then chooses its own device."""
    task: str
    """For messages: "task 1 of 4", empty where there is one."""
    max_bad_share: float


@verb(EncodeOptions)
def encode(options: EncodeOptions) -> dict[str, Any]:
    """Encode image shards to latent shards; running the same command again goes on where it stopped, or says it is done.

    Returns:
        A summary: `out`, `shards`, `samples`, `skipped`, `finished`. While other tasks have shards to do, `finished` is False and
        the counts are of this task; once finished they are of all, and the statistics are with them (see LatentStatistics.summary).

    Raises:
        RecipeError: an option that is not allowed.
        DataError: shards that are missing or damaged, or too many images that can't be read (shard and key are named).
        ModelError: no such model, or one that takes no images.
        OutputError: `out` can't be written or holds another job, such as that of another model, resolution or dtype.
    """
    folder, layout = Path(options.out), options.format
    if layout == "latentae":
        return _encode(options)
    _check_format(options)
    latents = replace(
        options,
        out=folder / "latents",
        flip=options.flip or layout in NEED_FLIPS,
        keep_images=options.keep_images or layout in NEED_IMAGES,
    )
    summary = _encode(latents)
    if not summary["finished"]:
        return summary
    from latentae.encoding import formats

    return {**summary, "out": str(formats.write(layout, folder / "latents", folder / layout))}


def _encode(options: EncodeOptions) -> dict[str, Any]:
    work = prepare(options)
    if work.pending and options.engine == "ray":
        from latentae.encoding import ray_engine

        ray_engine.run(work)
    elif work.pending:
        _run(work)
    return conclude(work)


def _check_format(options: EncodeOptions) -> None:
    """Refuse before the work what the writer of a layout would refuse after it."""
    layout, shards = options.format, options.shards
    if is_remote(str(options.out)):
        raise RecipeError(
            f"format {layout} is written to a local folder, not to a URL; copy it there afterwards"
        )
    if options.buckets != "none" and layout not in TAKE_BUCKETS:
        raise RecipeError(
            f"format {layout} holds latents of one size; give buckets none, or one of {', '.join(TAKE_BUCKETS)}"
        )
    if layout in NEED_LABELS and not has_label(expand_shards(shards)):
        raise RecipeError(
            f"format {layout} needs a class label for each sample, and the first one of {shards} has none; give each a `cls` member, "
            'or a `json` with a whole number as "label"'
        )
    if layout != "kohya":
        return
    if (factor := resolve_model(options.model, options.weights).config.downsampling) != 8:
        raise RecipeError(
            f"kohya reads latents of 8 pixels, but {options.model} downsamples by {factor}; choose another model or format"
        )
    index = _index(expand_shards(shards))
    if index.sources:  # of remote shards without an index, keys are known once they have been read
        from latentae.encoding.formats import kohya

        kohya.check_names(Path(options.out) / layout, index.names())


def prepare(options: EncodeOptions) -> Work:
    """Claim the output of `encode` and find out what is left to do."""
    task, tasks = resolve_task(options.task_id, options.num_tasks)
    source = resolve_model(options.model, options.weights)
    side = _resolution(source, options.resolution)
    sizes = _bucket_sizes(side, options.buckets, source.config.downsampling)
    where = choose_device(options.device)
    store = Store.open(options.out)
    index = _index(expand_shards(options.shards))
    plan = plan_shards(index)

    about = {
        "model": source.fingerprint,
        "resolution": side,
        "buckets": [list(size) for size in sizes] or "none",
        "preprocessing": PREPROCESSING,
        "compute": _compute(options.compute_dtype, where),
        **identity(options),
    }
    fingerprint = hashlib.sha256(json.dumps([FORMAT_VERSION, about]).encode()).hexdigest()
    settings = ShardSettings(
        side,
        options.dtype,
        options.batch_size,
        options.keep_images,
        source.config.latent_channels,
        fingerprint,
        flip=options.flip,
        packed=options.packed,
        buckets=sizes,
        workers=default_workers(where) if options.workers is None else options.workers,
        in_channels=source.config.in_channels,
        pin=where.type == "cuda",
        max_pixels=options.max_pixels,
    )
    inputs = {
        **about,
        "shards": {"count": len(plan), "samples": index.samples, "digest": plan_digest(plan)},
    }
    job = store.claim("encode", inputs, {"model_path": str(Path(options.model).absolute())})
    mine = plan[task::tasks]
    return Work(
        job,
        store,
        plan,
        mine,
        [
            shard
            for shard, sidecar in find_finished(store, mine, fingerprint, store.sizes())
            if sidecar is None
        ],
        settings,
        source,
        partial(build_encoder, source.weights_file, options.device, about["compute"]),
        f"task {task} of {tasks}" if tasks > 1 else "",
        options.max_bad_share,
    )


def _compute(compute_dtype: str, device: torch.device) -> str:
    if compute_dtype != "auto":
        return compute_dtype
    return "bf16" if device.type == "cuda" else "fp32"


def _bucket_sizes(side: int, buckets: str, factor: int) -> tuple[tuple[int, int], ...]:
    sizes = DataOptions(resolution=side, buckets="auto" if buckets == "auto" else "none").bucket_sizes()
    if any(length % factor for size in sizes for length in size):
        raise ImageError(
            f"the sides of buckets are no multiples of the model's downsampling factor {factor}; encode squares (buckets none)"
        )
    return sizes


def _index(shards: list[str]) -> ShardIndex:
    """What the shards hold; of remote ones only the sizes, which are had without reading them."""
    if not any(map(is_remote, shards)):
        return load_index(shards)
    sizes = zip(shards, sizes_of(shards), strict=True)
    return ShardIndex(tuple(ShardEntry(path, name_of(path), 0, size) for path, size in sizes))


def _run(work: Work) -> None:
    """Encode the pending shards here."""
    done, total = (sum(shard.samples for shard in some) for some in (work.pending, work.mine))
    done = total - done
    if done:
        say(f"encode: {done} of {total} samples are already done")
    remove_leftovers(work.store)
    encoder = work.make_encoder()
    with Progress("encoding", total=total or None, initial=done) as progress:
        for _ in encode_shards(_still_pending(work), work.store, encoder, work.settings, progress.advance):
            continue  # the sidecars are read again at the end, with those of other tasks


def _still_pending(work: Work) -> Iterator[tuple[str, str]]:
    """The pending shards that no other task, given the same ones, has done in the meantime."""
    for shard in work.pending:
        if shard.finished(work.store, work.settings.fingerprint) is None:
            yield shard.source, shard.name


@dataclass
class _Total:
    """What all finished sidecars say together."""

    statistics: LatentStatistics
    shards: int = 0
    read: int = 0
    samples: int = 0
    skipped: int = 0
    unreadable: int = 0
    first_unreadable: str = ""

    def add(self, sidecar: Sidecar) -> None:
        self.statistics = self.statistics.merge(LatentStatistics.from_json(sidecar.statistics))
        self.shards += 1
        self.read += sidecar.input.samples
        self.samples += sidecar.output.samples
        self.skipped += sum(len(keys) for keys in sidecar.skipped.values())
        unreadable = sidecar.skipped.get(UNREADABLE, [])
        self.unreadable += len(unreadable)
        if unreadable and not self.first_unreadable:
            self.first_unreadable = f"{unreadable[0]} in {sidecar.shard}"


def _add_up(work: Work, shards: list[Shard], sizes: Mapping[str, int]) -> _Total:
    total = _Total(LatentStatistics.empty(work.settings.channels))
    for _, sidecar in find_finished(work.store, shards, work.settings.fingerprint, sizes):
        if sidecar is not None:
            total.add(sidecar)
    return total


def conclude(work: Work) -> dict[str, Any]:
    """Merge the statistics if all shards are in place, and say where the job stands.

    Raises:
        ImageError: all shards are in place, but too many images could not be read.
    """
    there = work.store.sizes()
    listed = sum(shard.name in there and sidecar_name(shard.name) in there for shard in work.plan)
    # With thousands of tasks at an object store, only the last one may read all sidecars: the others see from the listing that some lack.
    total = _add_up(work, work.plan if listed == len(work.plan) else work.mine, there)
    summary: dict[str, Any] = {
        "out": work.store.shown,
        "shards": total.shards,
        "samples": total.samples,
        "skipped": total.skipped,
        "finished": total.shards == len(work.plan),
    }
    if not summary["finished"]:
        place = f"{min(listed, len(work.plan) - 1)} of {len(work.plan)} shards are in place"
        say(f"encode: {work.task or 'this task'} is done; {place}, the last task writes {STATISTICS}")
        return summary
    _check_share(total, work.max_bad_share)
    record = {
        "format_version": FORMAT_VERSION,
        "model": work.source.fingerprint,
        "fingerprint": work.settings.fingerprint,
        "resolution": work.settings.resolution,
        "dtype": work.settings.dtype,
        "skipped": total.skipped,
        **total.statistics.summary(),
        "merged": total.statistics.to_json(),
    }
    text = json_bytes(record)
    remove_leftovers(work.store)
    if work.pending or work.job.state != "finished" or work.store.read(STATISTICS) != text:
        work.store.write_bytes(STATISTICS, text)
        work.job.finish(samples=total.samples, skipped=total.skipped)
        say(
            f"encode: {total.samples} latents in {total.shards} shards, {total.skipped} skipped, in {work.store.shown}"
        )
    else:
        say(
            f"encode: {work.store.shown} is already finished, {total.samples} latents in {total.shards} shards; nothing to do"
        )
    return {**summary, **total.statistics.summary()}


def _check_share(total: _Total, limit: float) -> None:
    if total.unreadable > limit * total.read:
        share = total.unreadable / total.read
        raise ImageError(
            f"{total.unreadable} of {total.read} images can't be read ({share:.3g} of all, max_bad_share is {limit:g}), the first is "
            f"{total.first_unreadable}; the sidecars name all: replace them and encode into another folder, or raise max_bad_share "
            "and run the same command again"
        )


def _resolution(source: ModelSource, resolution: int | None) -> int:
    """The side to encode at, once it is sure that the model can."""
    side = source.resolution if resolution is None else resolution
    source.check_channels(decodes=False)
    source.check_side(side)
    return side
