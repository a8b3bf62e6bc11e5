"""The verb `encode`: shards of images to shards of latents, one to one, on any number of machines.

Each task encodes every num_tasks-th shard and never waits for another task. A shard is done when it
has a valid sidecar. The task that finds all shards done writes `statistics.json` and closes the
job. `prepare` and `conclude` are the first and the last step, for callers that encode in their own
way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from latentae.data.decode import decode_sample
from latentae.data.order import default_buckets
from latentae.data.shard_files import expand_shards, read_shard
from latentae.data.shard_index import ShardEntry, ShardIndex, load_index
from latentae.data.sources import is_remote, name_of, sizes_of
from latentae.device import choose_device
from latentae.encoding import formats
from latentae.encoding.formats import kohya
from latentae.encoding.image_batches import UNREADABLE
from latentae.encoding.latent_shard import MISSING_LABELS, has_label
from latentae.encoding.options import EncodeOptions
from latentae.encoding.plan import Shard, ShardSettings, Work, find_finished, plan_digest, plan_shards
from latentae.encoding.ray_engine import encode_on_ray
from latentae.encoding.shard_encoder import build_encoder, encode_shards
from latentae.encoding.sidecar import FORMAT_VERSION, Sidecar, sidecar_name
from latentae.encoding.store import open_store
from latentae.encoding.threads import default_workers
from latentae.errors import ImageError, RecipeError
from latentae.file_names import STATISTICS
from latentae.files import json_bytes
from latentae.jobs import resolve_task
from latentae.models.latent_statistics import LatentStatistics
from latentae.models.pretrained import resolve_model
from latentae.options import identity, verb
from latentae.progress import Progress, say

__all__ = ["conclude", "encode", "prepare"]

PREPROCESSING = "resized to cover the bucket (antialiased bicubic), centre crop"  # part of the fingerprint


@verb(EncodeOptions)
def encode(options: EncodeOptions) -> dict[str, Any]:
    """Encode image shards to latent shards. Run the same command again to resume.

    Returns:
        `out`, `shards`, `samples`, `skipped` and `finished`. While other tasks have shards to do,
        `finished` is False and the counts are of this task. Afterwards they are of all tasks, and
        the statistics are included (see LatentStatistics.summary).

    Raises:
        RecipeError: an invalid option.
        DataError: shards are missing or damaged, or too many images are unreadable.
        ModelError: the model is missing or does not take image files.
        OutputError: `out` can't be written or holds another job, such as another model's latents.
    """
    folder, layout = Path(options.out), options.format
    if layout == "latentae":
        return _encode(options)
    _check_format(options)
    summary = _encode(
        replace(
            options,
            out=folder / "latents",
            flip=options.flip or formats.FORMATS[layout].flips,
            keep_images=options.keep_images or formats.FORMATS[layout].images,
        )
    )
    if not summary["finished"]:
        return summary
    return {**summary, "out": str(formats.write(layout, folder / "latents", folder / layout))}


def _check_format(options: EncodeOptions) -> None:
    """Check before encoding what the writer of a layout needs."""
    layout, needs = options.format, formats.FORMATS[options.format]
    if is_remote(str(options.out)):
        raise RecipeError(f"format {layout} is written to a local folder, not to a URL; copy it afterwards")
    if options.buckets != "none" and not needs.buckets:
        accept = ", ".join(name for name, other in formats.FORMATS.items() if other.buckets)
        raise RecipeError(f"format {layout} holds latents of one size; use buckets none, or format {accept}")
    if needs.labels and not has_label(expand_shards(options.shards)):
        raise RecipeError(
            f"format {layout} needs a class label for each sample, but the first sample of {options.shards} "
            f"has none; {MISSING_LABELS}"
        )
    if layout == "kohya":
        factor = resolve_model(options.model, options.weights).config.downsampling
        if factor != kohya.FACTOR:
            raise RecipeError(
                f"kohya reads latents downsampled by {kohya.FACTOR}, but {options.model} downsamples by "
                f"{factor}; choose another model or format"
            )
        index = _index(options)
        if index.sources:  # keys in remote shards without an index are unknown until they are read
            kohya.check_names(Path(options.out) / layout, index.names())


def _encode(options: EncodeOptions) -> dict[str, Any]:
    work = prepare(options)
    if work.pending:
        total, left = (sum(shard.samples for shard in some) for some in (work.mine, work.pending))
        if total > left:
            say(f"encode: {total - left} of {total} samples are already done")
        work.store.remove_leftovers()
        engine = encode_on_ray if options.engine == "ray" else _encode_here
        with Progress("encoding", total=total or None, initial=total - left) as progress:
            engine(work, progress.advance)
    return conclude(work)


def _encode_here(work: Work, advance: Callable[[int], object]) -> None:
    """Encode shards in this process, except those that another task has done in the meantime."""
    fingerprint = work.settings.fingerprint
    pending = (shard for shard in work.pending if shard.finished(work.store, fingerprint) is None)
    for _ in encode_shards(pending, work.store, work.make_encoder(), work.settings, advance):
        continue  # `conclude` reads the sidecars, with those of other tasks


def prepare(options: EncodeOptions) -> Work:
    """Claim the output of `encode` and find the shards that are left to do."""
    task, tasks = resolve_task(options.task_id, options.num_tasks)
    source = resolve_model(options.model, options.weights)
    source.check_channels(decodes=False)
    side = source.resolution if options.resolution is None else options.resolution
    source.check_side(side)
    buckets = default_buckets(side) if options.buckets == "auto" else ()
    factor = source.config.downsampling
    if any(length % factor for size in buckets for length in size):
        raise ImageError(
            f"the sides of buckets are multiples of 64 pixels, but the model needs multiples of {factor}; "
            "use buckets none"
        )
    device = choose_device(options.device)
    store = open_store(options.out)
    index = _index(options)
    plan = plan_shards(index)
    auto = "bf16" if device.type == "cuda" else "fp32"
    about = {
        "model": source.fingerprint,
        "resolution": side,
        "buckets": [list(size) for size in buckets] or "none",
        "preprocessing": PREPROCESSING,
        "compute": auto if options.compute_dtype == "auto" else options.compute_dtype,
        **identity(options),
    }
    settings = ShardSettings(
        options,
        hashlib.sha256(json.dumps([FORMAT_VERSION, about]).encode()).hexdigest(),
        buckets or ((side, side),),
        source.config.in_channels,
        source.config.latent_channels,
        workers=default_workers(device) if options.workers is None else options.workers,
        pin=device.type == "cuda",
    )
    shards = {"count": len(plan), "samples": index.samples, "digest": plan_digest(plan)}
    notes = {"model_path": str(Path(options.model).absolute())}
    job = store.claim("encode", {**about, "shards": shards}, notes)
    mine = plan[task::tasks]
    found = find_finished(store, mine, settings.fingerprint, store.sizes())
    return Work(
        job,
        store,
        settings,
        partial(build_encoder, source.weights_file, options.device, about["compute"]),
        plan,
        mine,
        pending=[shard for shard, sidecar in found if sidecar is None],
        task=f"task {task} of {tasks}" if tasks > 1 else "this task",
    )


def _index(options: EncodeOptions) -> ShardIndex:
    """The index of the shards; of remote shards only the sizes, which need no reading."""
    shards = expand_shards(options.shards)
    if not any(map(is_remote, shards)):
        return load_index(shards)
    sizes = zip(shards, sizes_of(shards), strict=True)
    return ShardIndex(tuple(ShardEntry(path, name_of(path), 0, size) for path, size in sizes))


@dataclass
class _Total:
    """Sums over finished shards."""

    statistics: LatentStatistics
    shards: int = 0
    read: int = 0
    samples: int = 0
    skipped: int = 0
    unreadable: int = 0
    first_unreadable: tuple[Shard, str] | None = None
    """Shard and key."""

    def add(self, shard: Shard, sidecar: Sidecar) -> None:
        self.statistics = self.statistics.merge(LatentStatistics.from_json(sidecar.statistics))
        self.shards += 1
        self.read += sidecar.input.samples
        self.samples += sidecar.output.samples
        self.skipped += sidecar.skips
        unreadable = sidecar.skipped.get(UNREADABLE, [])
        self.unreadable += len(unreadable)
        if unreadable and self.first_unreadable is None:
            self.first_unreadable = shard, unreadable[0]


def conclude(work: Work) -> dict[str, Any]:
    """Close the job if all shards are done, and return the summary of `encode`.

    Raises:
        ImageError: all shards are done, but too many images are unreadable.
    """
    sizes = work.store.sizes()
    listed = sum(shard.name in sizes and sidecar_name(shard.name) in sizes for shard in work.plan)
    # Only the last task reads all sidecars: thousands of tasks would overload an object store.
    shards = work.plan if listed == len(work.plan) else work.mine
    total = _Total(LatentStatistics.empty(work.settings.latent_channels))
    for shard, sidecar in find_finished(work.store, shards, work.settings.fingerprint, sizes):
        if sidecar is not None:
            total.add(shard, sidecar)
    finished = total.shards == len(work.plan)
    summary = {
        "out": work.store.shown,
        "shards": total.shards,
        "samples": total.samples,
        "skipped": total.skipped,
        "finished": finished,
    }
    if not finished:
        done = min(listed, len(work.plan) - 1)
        say(
            f"encode: {work.task} is done; {done} of {len(work.plan)} shards are done, the last task writes "
            f"{STATISTICS}"
        )
        return summary
    _check_share(total, work.settings)
    text = json_bytes(
        {
            "format_version": FORMAT_VERSION,
            "model": work.job.inputs["model"],
            "fingerprint": work.settings.fingerprint,
            "resolution": work.job.inputs["resolution"],
            "dtype": work.settings.options.dtype,
            "skipped": total.skipped,
            **total.statistics.summary(),
            "merged": total.statistics.to_json(),
        }
    )
    work.store.remove_leftovers()
    found = f"{total.samples} latents in {total.shards} shards"
    if work.pending or work.job.state != "finished" or work.store.read(STATISTICS) != text:
        work.store.write_bytes(STATISTICS, text)
        work.job.finish(samples=total.samples, skipped=total.skipped)
        say(f"encode: {found}, {total.skipped} skipped, in {work.store.shown}")
    else:
        say(f"encode: {work.store.shown} is already finished, {found}; nothing to do")
    return {**summary, **total.statistics.summary()}


def _check_share(total: _Total, settings: ShardSettings) -> None:
    limit = settings.options.max_bad_share
    if total.first_unreadable is None or total.unreadable <= limit * total.read:
        return
    shard, key = total.first_unreadable
    share = f"{total.unreadable / total.read:.3g} of all, max_bad_share is {limit:g}"
    raise ImageError(
        f"{total.unreadable} of {total.read} images are unreadable ({share}), the first is {key} in "
        f"{shard.name}{_reason(shard, key, settings)}; the sidecars list all: replace them and encode into "
        "another folder, or raise max_bad_share and run the same command again"
    )


def _reason(shard: Shard, key: str, settings: ShardSettings) -> str:
    """Why an image is unreadable, from decoding it again: sidecars have no reasons."""
    try:
        for raw in filter(lambda raw: raw["__key__"] == key, read_shard(shard.source)):
            decode_sample(raw, channels=settings.in_channels, max_pixels=settings.options.max_pixels)
    except ImageError as error:
        return f" ({error})"
    return ""
