"""Batches for training, without end, and for evaluation, in order. The training loader splits the data over ranks and workers.

Never pass the loader to `accelerator.prepare`: the data would be split twice.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latentae.data.decode import Sample, decode_sample
from latentae.data.index import ShardIndex, load_index
from latentae.data.options import DataOptions
from latentae.data.order import derive_seed, pieces, share
from latentae.data.shards import RawSample, expand_shards, read_shard, shard_keys
from latentae.data.transforms import random_crop_flip, resize_and_center_crop
from latentae.errors import DataError, LatentAEError, ShardError

__all__ = ["STATE_VERSION", "Batch", "TrainLoader", "image_batches", "is_held_out"]

STATE_VERSION = 1


@dataclass(frozen=True)
class Batch:
    """Images of one size, ready for the device."""

    keys: tuple[str, ...]
    images: Tensor  # uint8 [B, 3, H, W], channels_last

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (DataLoader calls this)."""
        return Batch(self.keys, self.images.pin_memory())

    @classmethod
    def of(cls, samples: list[Sample]) -> Batch:
        """Join samples of one size."""
        images = torch.empty((len(samples), *samples[0].image.shape), dtype=torch.uint8, memory_format=torch.channels_last)
        for row, sample in zip(images, samples, strict=True):
            row.copy_(sample.image)
        return cls(tuple(sample.key for sample in samples), images)


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the held-out slice: decided by its key alone, so the same in every run and data set."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8, key=b"latentae held out").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def image_batches(
    shards: list[str], resolution: int, batch_size: int, *, limit: int | None = None, only_held_out: float | None = None
) -> Iterator[Batch]:
    """Yield every image once, resized and centre-cropped, in shard order; the last batch may be smaller.

    Args:
        shards: files, as from `expand_shards`.
        resolution: side of the images in pixels.
        batch_size: images in a batch.
        limit: stop after so many images.
        only_held_out: only the held-out slice of this fraction (see `is_held_out`).

    Raises:
        ShardError, ImageError: a shard is damaged, a sample can't be decoded.
    """
    raw = itertools.islice(itertools.chain.from_iterable(_read(path, only_held_out) for path in shards), limit)
    decoded = (decode_sample(sample) for sample in raw)  # one image at a time at full size
    cropped = (Sample(sample.key, resize_and_center_crop(sample.image, resolution)) for sample in decoded)
    while chunk := list(itertools.islice(cropped, batch_size)):
        yield Batch.of(chunk)


def _read(path: str, only_held_out: float | None) -> Iterator[RawSample]:
    if only_held_out is None:
        return read_shard(path)
    return read_shard(path, [key for key in shard_keys(path) if is_held_out(key, only_held_out)])


def _check_apart(validation: str, training: ShardIndex) -> None:
    if validation in ("auto", "none"):
        return
    trained = {Path(shard.path).resolve() for shard in training.shards}
    both = [path for path in expand_shards(validation) if Path(path).resolve() in trained]
    if both:
        raise DataError(
            f"{both[0]} is among the training shards and the validation shards; keep them apart, or use validation 'auto'"
        )


@dataclass
class _DecodedImages:
    """Decoded images kept from one epoch to the next.

    It fills once and drops nothing: every epoch asks for every image once, so replacing the oldest would always drop the image
    that is needed soonest.
    """

    budget: int  # bytes
    images: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def get(self, raw: RawSample) -> Tensor:
        name = (raw["__url__"], raw["__key__"])
        image = self.images.get(name)
        if image is None:
            image = decode_sample(raw).image
            if image.numel() <= self.budget:
                self.budget -= image.numel()
                self.images[name] = image
        return image


@dataclass(frozen=True)
class _Plan:
    """All that the order of the samples depends on, plain values that travel to worker processes."""

    shards: tuple[str, ...]
    counts: tuple[int, ...]  # training samples in each shard
    held_out: float | None  # the fraction left out of training
    batch_size: int
    seed: int
    world_size: int
    options: DataOptions

    @property
    def samples(self) -> int:
        return sum(self.counts)

    @property
    def lanes(self) -> int:
        """Readers in each rank: its workers, or the rank itself."""
        return max(self.options.workers, 1)

    def epoch_samples(self, epoch: int, part: int) -> Iterator[RawSample]:
        """What one reader gets in one epoch, still encoded, shuffled."""
        from webdataset.filters import shuffle

        rng = random.Random(derive_seed("shuffle", self.seed, epoch, part))
        buffer = self.options.shuffle_buffer
        return iter(shuffle(buffer, initial=buffer, rng=rng)(self._epoch_in_order(epoch, part)))

    def _epoch_in_order(self, epoch: int, part: int) -> Iterator[RawSample]:
        for piece in pieces(self.counts, self.seed, epoch, part, self.world_size * self.lanes):
            path = self.shards[piece.shard]
            keys = [key for key in shard_keys(path) if self.held_out is None or not is_held_out(key, self.held_out)]
            if len(keys) != self.counts[piece.shard]:
                found = f"{len(keys)} training samples where there were {self.counts[piece.shard]}"
                raise ShardError(f"shard {path} has changed since the start ({found}); start again with the shards as they are")
            yield from read_shard(path, keys[piece.start : piece.stop])


class _BatchStream(IterableDataset):
    """The endless batches of one rank; in a worker process, those of that worker."""

    def __init__(self, plan: _Plan, rank: int, start: int) -> None:
        self.plan, self.rank, self.start = plan, rank, start

    def __iter__(self) -> Iterator[Batch | LatentAEError]:
        info = get_worker_info()
        # DataLoader asks its workers in turn, from the first; so that batch number `start` comes first, turn the lanes.
        lane = ((info.id if info else 0) + self.start) % self.plan.lanes
        done = (self.start - lane + self.plan.lanes - 1) // self.plan.lanes  # batches b < start with b % lanes == lane
        try:
            yield from self._batches(self.rank * self.plan.lanes + lane, done)
        except LatentAEError as error:  # DataLoader would wrap it in a traceback of many lines
            yield error

    def _batches(self, part: int, done: int) -> Iterator[Batch]:
        plan, options = self.plan, self.plan.options
        cache = _DecodedImages(options.cache_mb * 1_000_000 // plan.lanes)
        first, skip = divmod(done * plan.batch_size, share(plan.samples, part, plan.world_size * plan.lanes))
        samples: list[Sample] = []
        for epoch in itertools.count(first):
            for raw in itertools.islice(plan.epoch_samples(epoch, part), skip if epoch == first else 0, None):
                seed = derive_seed("augment", plan.seed, epoch, raw["__key__"])
                scale = (options.scale_min, options.scale_max)
                crop = random_crop_flip(cache.get(raw), options.resolution, scale=scale, seed=seed, flip=options.flip)
                samples.append(Sample(raw["__key__"], crop))
                if len(samples) == plan.batch_size:
                    yield Batch.of(samples)
                    samples = []


class TrainLoader:
    """Endless training batches of one rank, in an order that depends only on the arguments; it can stop and go on exactly.

    Args:
        options: the `[data]` table; `shards` must name shards.
        batch_size: images per batch of this rank.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.

    Attributes:
        samples: training samples of an epoch, over all ranks.
        held_out: samples kept out of training for validation "auto".

    Raises:
        DataError: no shards, shards that validation names too, or fewer training samples than one batch over all ranks takes or
            than there are workers.
    """

    def __init__(self, options: DataOptions, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if options.shards is None:
            raise DataError("no training data: data.shards is not set; name a folder of shards or of images")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"batch size {batch_size}, rank {rank} of {world_size} make no loader; expected a batch of 1 or more per rank"
            )
        index = load_index(expand_shards(options.shards))
        _check_apart(options.validation, index)
        held_out = options.validation_fraction if options.validation == "auto" else None
        counts = [shard.samples for shard in index.shards]
        if held_out is not None:
            counts = [sum(not is_held_out(key, held_out) for key in shard_keys(shard.path)) for shard in index.shards]
        self._plan = _Plan(
            tuple(shard.path for shard in index.shards), tuple(counts), held_out, batch_size, seed, world_size, options
        )
        self._rank, self._digest, self._batches = rank, index.digest, 0
        self.samples, self.held_out = sum(counts), index.samples - sum(counts)
        self._check_size(batch_size * world_size, world_size * self._plan.lanes)

    def _check_size(self, batch: int, readers: int) -> None:
        kept = f" ({self.held_out} more are held out for validation)" if self.held_out else ""
        found = f"found {self.samples} training images{kept} in {self._plan.options.shards}"
        if self.samples < batch:
            raise DataError(f"{found}, but one batch over all ranks takes {batch}; lower the batch size or add images")
        if self.samples < readers:
            raise DataError(f"{found}, but {readers} workers would read them; lower data.workers")

    def __iter__(self) -> Iterator[Batch]:
        """Go on from where the last iteration, or the loaded state, ended; one iteration at a time."""
        workers = self._plan.options.workers
        batches = DataLoader(
            _BatchStream(self._plan, self._rank, self._batches),
            batch_size=None,
            num_workers=workers,
            pin_memory=workers > 0 and torch.cuda.is_available(),
        )
        iterator = iter(batches)
        try:
            while True:
                try:
                    batch = next(iterator)
                except RuntimeError as error:
                    if not workers:
                        raise
                    raise DataError(
                        f"a data worker died ({str(error).splitlines()[0]}); lower data.workers or data.shuffle_buffer"
                    ) from error
                if isinstance(batch, LatentAEError):
                    raise batch
                self._batches += 1  # counted when handed over, so batches that workers made in advance are not
                yield batch
        finally:
            del iterator  # ends the workers

    @property
    def epoch(self) -> int:
        """Epochs completed, over all ranks."""
        return self._batches * self._plan.batch_size * self._plan.world_size // self.samples

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands, as plain JSON values; the same on every rank."""
        return {**self._identity(), "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration go on from a saved state.

        Raises:
            DataError: the state is of another format, or of other data, seed, batch size, number of ranks or of workers.
        """
        here = self._identity()
        for name, value in here.items():
            if state.get(name) != value:
                found = f"{name} was {state.get(name)!r} and is now {value!r}"
                raise DataError(f"can't resume the data order: {found}; use the settings of the saved run, or start a new one")
        batches = state.get("batches")
        if not isinstance(batches, int) or batches < 0:
            raise DataError(f"can't resume the data order: batches is {batches!r}, expected a count; the state is damaged")
        self._batches = batches

    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "format_version": STATE_VERSION,
            "digest": self._digest,
            "samples": self.samples,
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "world_size": plan.world_size,
            "workers": plan.options.workers,
            "shuffle_buffer": plan.options.shuffle_buffer,
        }
