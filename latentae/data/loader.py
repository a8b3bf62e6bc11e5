"""Batches of images: endless for training, in order for evaluation.

The training loader splits the data over ranks and workers.

Never pass the loader to `accelerator.prepare`, which would split the data a second time.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latentae.data.decode import MAX_PIXELS, Sample, decode_sample
from latentae.data.options import DataOptions
from latentae.data.order import EpochOrder, Selection, default_buckets, lane_share
from latentae.data.shard_files import RawSample, expand_shards, read_samples, read_shard
from latentae.data.shard_index import ShardIndex, load_index
from latentae.data.sources import is_remote
from latentae.data.transforms import augment, kept_short_side, resize_and_center_crop
from latentae.errors import DataError, ImageError, LatentAEError, first_line
from latentae.keyed import derive_seed, whole_seed
from latentae.progress import say

__all__ = [
    "STATE_VERSION",
    "BadSample",
    "Batch",
    "TrainLoader",
    "decode_for_training",
    "from_worker",
    "image_batches",
    "parallel_batches",
]

STATE_VERSION = 2
_SPARES = 16  # samples tried instead of an unreadable one
_FORGIVEN = 8  # unreadable samples before their share counts: one in ten says nothing


@dataclass(frozen=True)
class BadSample:
    """An unreadable sample, the reason, and its replacement."""

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
        shape = (len(samples), *first.shape)
        images = torch.empty(shape, dtype=first.dtype, memory_format=torch.channels_last)
        for row, sample in zip(images, samples, strict=True):
            row.copy_(sample.image)
        return cls(tuple(sample.key for sample in samples), images, tuple(bad))

    @classmethod
    def join(cls, parts: Sequence[Batch], pin: bool = False) -> Batch:
        """Join several batches, in page-locked memory for a GPU."""
        if len(parts) == 1 and not pin:
            return parts[0]
        first = parts[0].images
        shape = (sum(len(part.images) for part in parts), *first.shape[1:])
        images = torch.empty(shape, dtype=first.dtype, memory_format=torch.channels_last, pin_memory=pin)
        torch.cat([part.images for part in parts], out=images)
        keys, bad = (part.keys for part in parts), (part.bad for part in parts)
        return cls(tuple(itertools.chain(*keys)), images, tuple(itertools.chain(*bad)))


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
    """Yield every image once, resized and center-cropped, in shard order.

    The last batch may be smaller.

    Args:
        shards: files, as from `expand_shards`.
        resolution: side of the images in pixels.
        batch_size: images per batch.
        limit: maximum number of images.
        only_held_out: only the held-out slice of this fraction (see `is_held_out`).
        channels: 1, 3 or 4.
        index: folder of the shards' indexes, for `only_held_out`; defaults to the folder of the
            shards.
        max_pixels: larger images are errors.

    Raises:
        ShardError, ImageError: a shard is damaged, a sample can't be decoded.
    """
    if only_held_out is None:
        every = itertools.chain.from_iterable(read_shard(path) for path in shards)
    else:
        every = _held_out_samples(load_index(shards, index), only_held_out)
    raw = itertools.islice(every, limit)
    options: dict[str, Any] = {"channels": channels, "max_pixels": max_pixels, "short": resolution}
    decoded = (decode_sample(sample, **options) for sample in raw)  # one full-size image in memory at a time
    cropped = (Sample(sample.key, resize_and_center_crop(sample.image, resolution)) for sample in decoded)
    while chunk := list(itertools.islice(cropped, batch_size)):
        yield Batch.of(chunk)


def _held_out_samples(index: ShardIndex, fraction: float) -> Iterator[RawSample]:
    """Read only the held-out slice, found by the index."""
    selection = Selection(index, fraction)
    for shard, entry in enumerate(index.shards):
        trained = set(selection.rows(shard)[0].tolist())
        yield from read_samples(index, shard, [row for row in range(entry.samples) if row not in trained])


def decode_for_training(
    raw: RawSample, options: DataOptions, bucket: tuple[int, int] | None = None
) -> Tensor:
    """The image that `augment` crops, by the `[data]` table; ImageError if it can't be read."""
    wanted = {name: getattr(options, name) for name in ("channels", "bits", "max_pixels")}
    return decode_sample(raw, **wanted, short=kept_short_side(options, bucket)).image


def _check_apart(validation: str, training: ShardIndex) -> None:
    if validation in ("auto", "none"):
        return
    trained = {_resolved(shard.path) for shard in training.shards}
    both = [path for path in expand_shards(validation) if _resolved(path) in trained]
    if both:
        advice = "separate them, or use validation 'auto'"
        raise DataError(f"{both[0]} is among the training shards and the validation shards; {advice}")


def _resolved(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())


class _DecodedImages:
    """A cache of decoded images for later epochs.

    It fills up once and evicts nothing: every epoch needs every image once, so the oldest image is
    the one needed soonest.
    """

    def __init__(self, budget: int, options: DataOptions) -> None:
        self.budget, self.options = budget, options  # bytes
        self.images: dict[tuple[str, str], Tensor] = {}

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
    """Everything that determines the order and the pixels of the samples, sent to workers."""

    selection: Selection
    counts: tuple[tuple[int, ...], ...]  # samples in use, of each shard in each pool
    seed: int
    digest: str
    global_batch: int
    options: DataOptions

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.counts, self.seed, epoch, self.digest, self.global_batch, pad=self.options.pad)


class _LaneStream(IterableDataset):
    """The endless batches of a rank's lanes or, in a worker process, of that worker's lanes."""

    def __init__(self, plan: _Plan, lanes: range, epoch: int, step: int) -> None:
        self.plan, self.lanes, self.epoch, self.step = plan, lanes, epoch, step

    def __iter__(self) -> Iterator[Batch | LatentAEError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return from_worker(self._batches(lane_share(self.lanes, worker, workers), workers))

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
        """The sample's crop, or a replacement that its key determines, the same on all ranks."""
        try:
            return self._crop(raw, pool)
        except ImageError as error:
            spare = self._spare(raw["__key__"], pool)
            bad.append(BadSample(raw["__key__"], raw["__url__"], str(error), spare.key, self.epoch, step))
            return spare

    def _spare(self, key: str, pool: int) -> Sample:
        selection = self.plan.selection
        for attempt in range(_SPARES):
            draw = derive_seed("spare", self.plan.seed, self.epoch, key, attempt)
            shard, row = self.order.spare(pool, draw)
            (raw,) = read_samples(selection.index, shard, [int(selection.rows(shard)[pool][row])])
            try:
                return self._crop(raw, pool)
            except ImageError:
                continue
        raise DataError(f"sample {key} and {_SPARES} replacements can't be read; check the data set")

    def _crop(self, raw: RawSample, pool: int) -> Sample:
        seed = derive_seed("augment", self.plan.seed, self.epoch, raw["__key__"])
        buckets = self.plan.selection.buckets
        bucket = buckets[pool] if buckets else None
        return Sample(raw["__key__"], augment(self.cache.get(raw, bucket), self.plan.options, seed, bucket))


class TrainLoader:
    """Endless training batches of one rank.

    The order depends only on seed, data and global batch. A run resumes exactly on any number of
    ranks and workers, as long as ranks times `batch_size` is the same.

    Args:
        options: the `[data]` table; `shards` must name shards.
        batch_size: images per step of this rank.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.
        bad_log: file to which unreadable samples are appended.

    Attributes:
        samples: training samples per epoch, over all ranks.
        held_out: samples left out of training for validation "auto".
        steps, tail: global batches per epoch, and samples that an epoch skips.

    Raises:
        DataError: no shards, shards that validation names too, or fewer training samples than one
            batch over all ranks.
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
            found = f"batch size is {batch_size} and rank is {rank} of {world_size}"
            raise DataError(f"{found}; expected 1 or more, and a rank from 0 to {world_size - 1}")
        index = load_index(expand_shards(options.shards), options.index)
        _check_apart(options.validation, index)
        held_out = options.validation_fraction if options.validation == "auto" else None
        buckets = ()
        if options.buckets != "none":
            buckets = default_buckets(options.resolution, options.bucket_step, options.bucket_max_ratio)
        selection = Selection(index, held_out, buckets)
        counts = tuple(tuple(pool) for pool in selection.counts())
        batch = batch_size * world_size
        self._plan = _Plan(selection, counts, whole_seed(seed), index.digest, batch, options)
        self._lanes = range(rank * batch_size, (rank + 1) * batch_size)
        self._epoch, self._step = 0, 0
        self._seen, self._bad, self._bad_in_a_row, self._bad_log = 0, 0, 0, bad_log
        self.samples = sum(map(sum, counts))
        self.held_out = index.samples - self.samples
        order = self._plan.order(0)
        self.steps, self.tail = order.steps, order.tail
        if not self.steps:
            more = f" ({self.held_out} more are held out for validation)" if self.held_out else ""
            each = " in any bucket" if selection.buckets else ""
            found = f"found {self.samples} training images{more} in {options.shards}"
            needed = f"one batch over all ranks takes {batch}{each}"
            raise DataError(f"{found}, but {needed}; lower the batch size or add images")

    def announce(self) -> None:
        """Log the number of images and steps, and what an epoch skips."""
        kept = f", {self.held_out} held out" if self.held_out else ""
        skipped = f"last {self.tail} images skipped (incomplete batch)"
        say(f"data: {self.samples} training images{kept}, {self.steps} steps per epoch; {skipped}")

    def __iter__(self) -> Generator[Batch, None, None]:
        """Resume after the last iteration or the loaded state.

        Only one iteration may run at a time.
        """
        workers = min(self._plan.options.workers, len(self._lanes))
        parts = parallel_batches(_LaneStream(self._plan, self._lanes, self._epoch, self._step), workers)
        pin = torch.cuda.is_available()
        try:
            while True:
                batch = Batch.join(list(itertools.islice(parts, max(workers, 1))), pin)
                self._count(batch)
                # The position counts consumed batches, not those that workers prepared.
                self._step += 1
                if self._step == self.steps:
                    self._epoch, self._step = self._epoch + 1, 0
                yield batch
        finally:
            parts.close()

    def _count(self, batch: Batch) -> None:
        """List unreadable samples. Stop if there are many, as the data set is then broken."""
        limits = self._plan.options
        names = {sample.key for sample in batch.bad}
        for sample in batch.bad:
            if self._bad_log is not None:
                with self._bad_log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(sample)) + "\n")
        self._seen, self._bad = self._seen + len(batch.keys), self._bad + len(names)
        self._bad_in_a_row = self._bad_in_a_row + len(names) if len(names) == len(batch.keys) else len(names)
        too_many = self._bad > _FORGIVEN and self._bad / self._seen > limits.max_bad_share
        if too_many or self._bad_in_a_row >= limits.max_bad_in_a_row:
            where = f"; all are listed in {self._bad_log}" if self._bad_log else ""
            found = f"{self._bad} of {self._seen} images could not be read ({batch.bad[-1].reason}){where}"
            advice = "repair the data set or raise data.max_bad_share and data.max_bad_in_a_row"
            raise DataError(f"{found}; {advice}")

    @property
    def epoch(self) -> int:
        """Completed epochs, over all ranks."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """The consumer's position, as plain JSON values; the same on every rank."""
        return {**self._identity(), "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration resume from a saved state of any number of ranks and workers.

        Raises:
            DataError: the state is of another format, or of other data, seed or global batch.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                found = f"{name} was {state.get(name)!r} and is now {value!r}"
                advice = "use the settings of the saved run, or start a new one"
                raise DataError(f"can't resume the data order: {found}; {advice}")
        epoch, step = state.get("epoch", -1), state.get("step", -1)
        valid = isinstance(epoch, int) and isinstance(step, int) and epoch >= 0 <= step
        if not valid or step >= max(self._plan.order(epoch).steps, 1):
            raise DataError(f"can't resume the data at epoch {epoch!r}, step {step!r}; the state is damaged")
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


def parallel_batches(dataset: IterableDataset, workers: int) -> Generator[Batch, None, None]:
    """The batches of a dataset from worker processes, or from this process without workers.

    Close it to end the workers.

    Args:
        dataset: yields the items of `from_worker`.
        workers: number of processes.

    Raises:
        LatentAEError: as the dataset; DataError if a worker dies.
    """
    start = _leave_signals_to_parent
    iterator = iter(DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=start))
    try:
        while True:
            try:
                part = next(iterator, None)
            except RuntimeError as error:
                if not workers:
                    raise
                found = f"a data worker died ({first_line(error)})"
                raise DataError(f"{found}; lower data.workers or data.cache_mb") from error
            if isinstance(part, LatentAEError):
                raise part
            if part is None:
                return
            yield part
    finally:
        # A process can hang at its end without this: a traceback keeps the iterator, and workers
        # ignore the first SIGTERM.
        shut_down = getattr(iterator, "_shutdown_workers", None)  # torch has no public name for it
        if shut_down is not None:
            shut_down()


def from_worker(batches: Iterator[Batch]) -> Iterator[Batch | LatentAEError]:
    """Send batches from a data worker: images in shared memory, and an error as the last item.

    DataLoader would wrap an error in a long traceback. torch would move images to shared memory in
    a thread whose errors are lost, and the parent would wait forever.
    """
    try:
        for batch in batches:
            if get_worker_info() is not None:
                _to_shared_memory(batch.images)
            yield batch
    except LatentAEError as error:
        yield error


def _to_shared_memory(images: Tensor) -> None:
    try:
        images.share_memory_()
    except (RuntimeError, OSError) as error:  # as in containers with a small /dev/shm
        found = f"a batch of {images.nbytes / 1e6:.2g} MB into shared memory ({first_line(error)})"
        advice = "give the container more (docker run --shm-size=8g) or set data.workers to 0"
        raise DataError(f"a data worker could not put {found}; {advice}") from error


def _leave_signals_to_parent(worker: int) -> None:
    """For DataLoader's `worker_init_fn`.

    A scheduler signals every process of a job, but the run must finish its step and save.

    PyTorch's workers die on SIGTERM, which raises an error at any point of the trainer. Here only
    the parent handles the first SIGTERM. Workers obey the second one, with which DataLoader ends a
    worker that does not stop.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: _obey_next(number))


def _obey_next(number: int) -> None:
    signal.signal(number, lambda number, frame: os._exit(0))
