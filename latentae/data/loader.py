"""Batches for training, without end, and for evaluation, in order. The training loader splits the data over ranks and workers.

Never pass the loader to `accelerator.prepare`: the data would be split twice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latentae.data.decode import MAX_PIXELS, Sample, decode_sample
from latentae.data.epoch_order import EpochOrder, lane_share
from latentae.data.options import DataOptions
from latentae.data.selection import Selection, is_held_out
from latentae.data.shard_files import RawSample, expand_shards, read_shard
from latentae.data.shard_index import ShardIndex, load_index, read_samples
from latentae.data.transforms import augment, kept_short_side, resize_and_center_crop
from latentae.data.workers import end_workers, leave_signals_to_parent, share
from latentae.errors import DataError, ImageError, LatentAEError
from latentae.keyed import derive_seed, whole_seed
from latentae.progress import say

__all__ = [
    "STATE_VERSION",
    "BadSample",
    "Batch",
    "TrainLoader",
    "decode_for_training",
    "image_batches",
    "is_held_out",
]

STATE_VERSION = 2
_SPARES = 16  # samples tried in place of one that can't be read
_FORGIVEN = 8  # bad samples before their share counts: one bad image among ten says nothing


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read, why, and what was taken in its place."""

    key: str
    shard: str
    reason: str
    replaced_by: str
    epoch: int
    step: int


@dataclass(frozen=True)
class Batch:
    """Images of one size, ready for the device."""

    keys: tuple[str, ...]
    images: Tensor  # uint8 or uint16 [B, C, H, W], channels_last
    bad: tuple[BadSample, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[Sample], bad: Sequence[BadSample] = ()) -> Batch:
        """Join samples of one size."""
        first = samples[0].image
        images = torch.empty(
            (len(samples), *first.shape), dtype=first.dtype, memory_format=torch.channels_last
        )
        for row, sample in zip(images, samples, strict=True):
            row.copy_(sample.image)
        return cls(tuple(sample.key for sample in samples), images, tuple(bad))

    @classmethod
    def join(cls, parts: Sequence[Batch], pin: bool = False) -> Batch:
        """One batch of several, in page-locked memory if it goes to a GPU."""
        if len(parts) == 1 and not pin:
            return parts[0]
        shape = (sum(len(part.images) for part in parts), *parts[0].images.shape[1:])
        images = torch.empty(
            shape, dtype=parts[0].images.dtype, memory_format=torch.channels_last, pin_memory=pin
        )
        torch.cat([part.images for part in parts], out=images)
        return cls(
            tuple(itertools.chain(*(p.keys for p in parts))),
            images,
            tuple(itertools.chain(*(p.bad for p in parts))),
        )


def image_batches(
    shards: list[str],
    resolution: int,
    batch_size: int,
    *,
    limit: int | None = None,
    only_held_out: float | None = None,
    channels: int = 3,
    index: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Batch]:
    """Yield every image once, resized and centre-cropped, in shard order; the last batch may be smaller.

    Args:
        shards: files, as from `expand_shards`.
        resolution: side of the images in pixels.
        batch_size: images in a batch.
        limit: stop after so many images.
        only_held_out: only the held-out slice of this fraction (see `is_held_out`).
        channels: 1, 3 or 4.
        index: folder of the shards' indexes, where they are not beside the shards (needed for `only_held_out` alone).
        max_pixels: of an image; larger ones are errors.

    Raises:
        ShardError, ImageError: a shard is damaged, a sample can't be decoded.
    """
    if only_held_out is None:
        every = itertools.chain.from_iterable(read_shard(path) for path in shards)
    else:
        every = _held_out_samples(load_index(shards, index), only_held_out)
    raw = itertools.islice(every, limit)
    options: dict[str, Any] = {"channels": channels, "max_pixels": max_pixels, "short": resolution}
    decoded = (decode_sample(sample, **options) for sample in raw)  # one image at a time at full size
    cropped = (Sample(sample.key, resize_and_center_crop(sample.image, resolution)) for sample in decoded)
    while chunk := list(itertools.islice(cropped, batch_size)):
        yield Batch.of(chunk)


def _held_out_samples(index: ShardIndex, fraction: float) -> Iterator[RawSample]:
    """The held-out slice alone, found in the index and read sample by sample."""
    selection = Selection(index, fraction)
    for shard, entry in enumerate(index.shards):
        trained = set(selection.rows(shard)[0].tolist())
        yield from read_samples(index, shard, [row for row in range(entry.samples) if row not in trained])


def decode_for_training(
    raw: RawSample, options: DataOptions, bucket: tuple[int, int] | None = None
) -> Tensor:
    """The image that `augment` crops, by the `[data]` table; ImageError where it can't be read."""
    short = kept_short_side(options, bucket)
    return decode_sample(
        raw, channels=options.channels, bits=options.bits, max_pixels=options.max_pixels, short=short
    ).image


def _check_apart(validation: str, training: ShardIndex) -> None:
    if validation in ("auto", "none"):
        return
    trained = {_place(shard.path) for shard in training.shards}
    both = [path for path in expand_shards(validation) if _place(path) in trained]
    if both:
        raise DataError(
            f"{both[0]} is among the training shards and the validation shards; keep them apart, or use validation 'auto'"
        )


def _place(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


@dataclass
class _DecodedImages:
    """Decoded images kept from one epoch to the next.

    It fills once and drops nothing: every epoch asks for every image once, so replacing the oldest would always drop the image
    that is needed soonest.
    """

    budget: int  # bytes
    options: DataOptions
    images: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def get(self, raw: RawSample, bucket: tuple[int, int] | None) -> Tensor:
        name = (raw["__url__"], raw["__key__"])
        image = self.images.get(name)
        if image is None:
            image = decode_for_training(raw, self.options, bucket)
            if image.nbytes <= self.budget:
                self.budget -= image.nbytes
                self.images[name] = image
        return image


@dataclass(frozen=True)
class _Plan:
    """All that the order and the pixels of the samples depend on, plain values that travel to worker processes."""

    selection: Selection
    counts: tuple[tuple[int, ...], ...]  # samples in use: for each pool, of each shard
    seed: int
    digest: str
    global_batch: int
    options: DataOptions

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.counts, self.seed, epoch, self.digest, self.global_batch, pad=self.options.pad)


class _PartStream(IterableDataset):
    """The endless batches of some lanes: those of a rank or, in a worker process, those of that worker."""

    def __init__(self, plan: _Plan, lanes: range, epoch: int, step: int) -> None:
        self.plan, self.lanes, self.epoch, self.step = plan, lanes, epoch, step

    def __iter__(self) -> Iterator[Batch | LatentAEError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            for batch in self._batches(lane_share(self.lanes, worker, workers), workers):
                share(batch.images)
                yield batch
        except LatentAEError as error:  # DataLoader would wrap it in a traceback of many lines
            yield error

    def _batches(self, lanes: range, workers: int) -> Iterator[Batch]:
        options, step = self.plan.options, self.step
        cache = _DecodedImages(options.cache_mb * 1_000_000 // workers, options)
        for epoch in itertools.count(self.epoch):
            yield from _EpochReader(self.plan, epoch, cache).batches(lanes, step)
            step = 0


class _EpochReader:
    """Reads lanes of one epoch."""

    def __init__(self, plan: _Plan, epoch: int, cache: _DecodedImages) -> None:
        self.plan, self.epoch, self.cache, self.order = plan, epoch, cache, plan.order(epoch)

    def batches(self, lanes: range, first: int) -> Iterator[Batch]:
        done = self.order.done(first)
        readers: dict[tuple[int, int], Iterator[RawSample]] = {}
        for step in range(first, self.order.steps):
            pool = self.order.pool_of(step)
            bad: list[BadSample] = []
            samples = []
            for lane in lanes:
                if (lane, pool) not in readers:
                    readers[lane, pool] = self._read(lane, pool, done[pool])
                samples.append(self._sample(next(readers[lane, pool]), pool, step, bad))
            yield Batch.of(samples, bad)

    def _read(self, lane: int, pool: int, start: int) -> Iterator[RawSample]:
        for run in self.order.lane(lane, pool, start):
            rows = self.plan.selection.rows(run.shard)[pool][list(run.rows)]
            yield from read_samples(self.plan.selection.index, run.shard, rows.tolist())

    def _sample(self, raw: RawSample, pool: int, step: int, bad: list[BadSample]) -> Sample:
        """The sample's crop; where it can't be decoded, that of another one which its key decides, so ranks never differ in length."""
        try:
            return self._crop(raw, pool)
        except ImageError as error:
            spare = self._spare(raw["__key__"], pool)
            bad.append(BadSample(raw["__key__"], raw["__url__"], str(error), spare.key, self.epoch, step))
            return spare

    def _spare(self, key: str, pool: int) -> Sample:
        selection = self.plan.selection
        for attempt in range(_SPARES):
            shard, row = self.order.spare(
                pool, derive_seed("spare", self.plan.seed, self.epoch, key, attempt)
            )
            (raw,) = read_samples(selection.index, shard, [int(selection.rows(shard)[pool][row])])
            try:
                return self._crop(raw, pool)
            except ImageError:
                continue
        raise DataError(
            f"sample {key} can't be read, nor can {_SPARES} others drawn in its place; check the data set"
        )

    def _crop(self, raw: RawSample, pool: int) -> Sample:
        seed = derive_seed("augment", self.plan.seed, self.epoch, raw["__key__"])
        buckets = self.plan.selection.buckets
        bucket = buckets[pool] if buckets else None
        return Sample(raw["__key__"], augment(self.cache.get(raw, bucket), self.plan.options, seed, bucket))


class TrainLoader:
    """Endless training batches of one rank. The order depends on seed, data and global batch alone: a run stops on some number of
    ranks and workers and goes on exactly on any other whose product with `batch_size` is the same.

    Args:
        options: the `[data]` table; `shards` must name shards.
        batch_size: images per step of this rank.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.
        bad_log: file that samples which can't be read are listed in.

    Attributes:
        samples: training samples of an epoch, over all ranks.
        held_out: samples kept out of training for validation "auto".
        steps, tail: global batches of the coming epoch, and samples that it leaves out.

    Raises:
        DataError: no shards, shards that validation names too, or fewer training samples than one batch over all ranks takes.
    """

    def __init__(
        self,
        options: DataOptions,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        bad_log: Path | None = None,
    ) -> None:
        if options.shards is None:
            raise DataError("no training data: data.shards is not set; name a folder of shards or of images")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"batch size {batch_size}, rank {rank} of {world_size} make no loader; expected a batch of 1 or more per rank"
            )
        index = load_index(expand_shards(options.shards), options.index)
        _check_apart(options.validation, index)
        held_out = options.validation_fraction if options.validation == "auto" else None
        selection = Selection(index, held_out, options.bucket_sizes())
        counts = tuple(tuple(pool) for pool in selection.counts())
        self._plan = _Plan(
            selection, counts, whole_seed(seed), index.digest, batch_size * world_size, options
        )
        self._lanes = range(rank * batch_size, (rank + 1) * batch_size)
        self._epoch, self._step = 0, 0
        self._seen, self._bad, self._bad_in_a_row, self._bad_log = 0, 0, 0, bad_log
        self.samples = sum(map(sum, counts))
        self.held_out = index.samples - self.samples
        order = self._plan.order(0)
        self.steps, self.tail = order.steps, order.tail
        if not self.steps:
            kept = f" ({self.held_out} more are held out for validation)" if self.held_out else ""
            each = " in any bucket" if selection.buckets else ""
            raise DataError(
                f"found {self.samples} training images{kept} in {options.shards}, but one batch over all ranks takes "
                f"{self._plan.global_batch}{each}; lower the batch size or add images"
            )

    def announce(self) -> None:
        """Say how much data there is and what an epoch leaves out."""
        kept = f", {self.held_out} held out" if self.held_out else ""
        say(
            f"data: {self.samples} training images{kept}, {self.steps} steps an epoch; {self.tail} of its tail are left out"
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        """Go on from where the last iteration, or the loaded state, ended; one iteration at a time."""
        workers = min(self._plan.options.workers, len(self._lanes))
        stream = _PartStream(self._plan, self._lanes, self._epoch, self._step)
        parts = DataLoader(
            stream, batch_size=None, num_workers=workers, worker_init_fn=leave_signals_to_parent
        )
        iterator = iter(parts)
        pin = torch.cuda.is_available()
        try:
            while True:
                batch = Batch.join([self._next(iterator, workers) for _ in range(max(workers, 1))], pin)
                self._count(batch)
                self._advance()  # counted when handed over, so batches that workers made in advance are not
                yield batch
        finally:
            end_workers(iterator)

    def _next(self, iterator: Iterator[Batch | LatentAEError], workers: int) -> Batch:
        try:
            part = next(iterator)
        except RuntimeError as error:
            if not workers:
                raise
            raise DataError(
                f"a data worker died ({str(error).splitlines()[0]}); lower data.workers or data.cache_mb"
            ) from error
        if isinstance(part, LatentAEError):
            raise part
        return part

    def _advance(self) -> None:
        self._step += 1
        if self._step == self.steps:
            self._epoch, self._step = self._epoch + 1, 0

    def _count(self, batch: Batch) -> None:
        """List what could not be read; too much of it means that the data set is broken, not a sample."""
        limits = self._plan.options
        names = {sample.key for sample in batch.bad}
        for sample in batch.bad:
            if self._bad_log is not None:
                with self._bad_log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(sample)) + "\n")
        self._seen, self._bad = self._seen + len(batch.keys), self._bad + len(names)
        self._bad_in_a_row = self._bad_in_a_row + len(names) if len(names) == len(batch.keys) else len(names)
        if not names:
            self._bad_in_a_row = 0
        share = self._bad / self._seen
        if self._bad_in_a_row >= limits.max_bad_in_a_row or (
            self._bad > _FORGIVEN and share > limits.max_bad_share
        ):
            last = batch.bad[-1]
            where = f"; all are listed in {self._bad_log}" if self._bad_log else ""
            raise DataError(
                f"{self._bad} of {self._seen} images could not be read ({last.reason}){where}; repair the data set or raise "
                "data.max_bad_share and data.max_bad_in_a_row"
            )

    @property
    def epoch(self) -> int:
        """Epochs completed, over all ranks."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands, as plain JSON values; the same on every rank."""
        return {**self._identity(), "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration go on from a saved state, of any number of ranks and workers.

        Raises:
            DataError: the state is of another format, or of other data, seed or global batch.
        """
        here = self._identity()
        for name, value in here.items():
            if state.get(name) != value:
                found = f"{name} was {state.get(name)!r} and is now {value!r}"
                raise DataError(
                    f"can't resume the data order: {found}; use the settings of the saved run, or start a new one"
                )
        epoch, step = state.get("epoch"), state.get("step")
        if (
            not isinstance(epoch, int)
            or not isinstance(step, int)
            or epoch < 0
            or not 0 <= step < max(self._plan.order(epoch).steps, 1)
        ):
            raise DataError(
                f"can't resume the data order at epoch {epoch!r}, step {step!r}; the state is damaged"
            )
        self._epoch, self._step = epoch, step

    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "format_version": STATE_VERSION,
            "digest": plan.digest,
            "samples": [sum(pool) for pool in plan.counts],
            "seed": plan.seed,
            "global_batch": plan.global_batch,
            "pad": plan.options.pad,
        }
