"""Training on remote shards without an index: webdataset's resampled stream.

It promises less than `TrainLoader`, and says so: samples are drawn shard by shard with replacement, an epoch has no end, another number
of ranks or workers sees other batches, and a run that goes on sees new samples rather than the ones it would have seen.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latentae.data.decode import Sample
from latentae.data.loader import BadSample, Batch, decode_for_training
from latentae.data.options import DataOptions
from latentae.data.reading import READ_EXTENSIONS
from latentae.data.shard_files import RawSample, expand_shards
from latentae.data.shard_index import IndexFiles
from latentae.data.sources import is_remote, shown, stream
from latentae.data.transforms import augment
from latentae.data.workers import end_workers, leave_signals_to_parent, share
from latentae.errors import DataError, ImageError, LatentAEError, ShardError
from latentae.keyed import derive_seed, whole_seed
from latentae.progress import say

__all__ = ["StreamLoader", "streams"]

SHUFFLE = 1000  # samples held to draw from, for each worker, still encoded
_FORMAT = "stream-1"


def streams(shards: Sequence[str], index: str | None) -> bool:
    """Whether these shards can only be streamed: remote, and without an index beside them or in the folder given."""
    if index is not None or not shards or not is_remote(shards[0]):
        return False
    files = IndexFiles(tuple(shards), None)
    return files.find(shards[0]) is None


class _Stream(IterableDataset):
    def __init__(
        self, shards: Sequence[str], batch_size: int, options: DataOptions, words: tuple[int, ...]
    ) -> None:
        self.shards, self.batch_size, self.options, self.words = list(shards), batch_size, options, words

    def __iter__(self) -> Iterator[Batch | LatentAEError]:
        info = get_worker_info()
        seed = derive_seed("stream", *self.words, info.id if info else 0)
        try:
            yield from self._batches(seed)
        except LatentAEError as error:  # DataLoader would wrap it in a traceback of many lines
            yield error

    def _batches(self, seed: int) -> Iterator[Batch]:
        samples: list[Sample] = []
        bad: list[BadSample] = []
        failures = 0
        for number, raw in enumerate(self._samples(seed)):
            try:
                samples.append(self._crop(raw, derive_seed("crop", seed, number)))
                failures = 0
            except ImageError as error:
                bad.append(BadSample(raw["__key__"], raw["__url__"], str(error), "the next one", -1, -1))
                failures += 1
                if failures >= self.options.max_bad_in_a_row:
                    raise DataError(
                        f"{failures} samples in a row can't be read, the last: {error}; check the shards"
                    ) from error
            if len(samples) == self.batch_size:
                batch = Batch.of(samples, bad)
                share(batch.images)
                yield batch
                samples, bad = [], []

    def _samples(self, seed: int) -> Iterator[RawSample]:
        import random

        from webdataset.filters import shuffle
        from webdataset.shardlists import ResampledShards

        urls = (
            entry["url"]
            for entry in ResampledShards(self.shards, seed=seed, worker_seed=lambda: 0, deterministic=True)
        )
        every = itertools.chain.from_iterable(map(_read_stream, urls))
        return iter(shuffle(SHUFFLE, initial=min(SHUFFLE, 100), rng=random.Random(seed))(every))

    def _crop(self, raw: RawSample, seed: int) -> Sample:
        options = self.options
        return Sample(raw["__key__"], augment(decode_for_training(raw, options), options, seed))


class _File:
    """What tarfile needs of a stream."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def read(self, count: int = -1) -> bytes:
        """Up to `count` bytes."""
        return self._source.read(1 << 20 if count < 0 else count)


def _read_stream(url: str) -> Iterator[RawSample]:
    """The samples of one shard, as they come: webdataset opens no URL itself, so no command can run, and decodes nothing."""
    from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

    def wanted(name: str) -> bool:
        extension = base_plus_ext(name)[1]
        return extension is not None and extension.lower() in READ_EXTENSIONS

    with stream(url) as file:
        try:
            yield from group_by_keys(
                tar_file_expander([{"url": url, "stream": _File(file)}], select_files=wanted)
            )
        except (tarfile.TarError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ShardError(
                f"shard {shown(url)} could not be read ({reason}); fetch or write it again, or leave it out"
            ) from error


class StreamLoader:
    """Endless training batches of one rank from shards that have no index.

    Args:
        options: the `[data]` table; `shards` must name remote shards.
        batch_size: images per step of this rank.
        seed: of the run.
        rank: of this process.

    Raises:
        DataError: aspect-ratio buckets were asked for, which need an index.
    """

    def __init__(self, options: DataOptions, batch_size: int, seed: int, rank: int = 0) -> None:
        if options.buckets != "none":
            raise DataError(
                "data.buckets needs the sizes of all images; run `latentae index SHARDS FOLDER` and give --data.index FOLDER"
            )
        self._options, self._batch_size, self._seed, self._rank = options, batch_size, whole_seed(seed), rank
        self._shards, self._batches = expand_shards(str(options.shards)), 0
        self.epoch = 0

    def announce(self) -> None:
        """Say what this loader does not promise."""
        say(
            f"data: {len(self._shards)} remote shards without an index are streamed: samples are drawn with replacement, and only a "
            "statistical resume is promised; `latentae index SHARDS FOLDER` and --data.index FOLDER give the exact order"
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        options = self._options
        words = (self._seed, self._rank, self._batches)  # a run that goes on draws anew
        dataset = _Stream(self._shards, self._batch_size, options, words)
        pin = options.workers > 0 and torch.cuda.is_available()
        parts = DataLoader(
            dataset, batch_size=None, num_workers=options.workers, worker_init_fn=leave_signals_to_parent
        )
        iterator = iter(parts)
        try:
            for batch in iterator:
                if isinstance(batch, LatentAEError):
                    raise batch
                self._batches += 1
                yield Batch.join([batch], pin)
        finally:
            end_workers(iterator)

    def state_dict(self) -> dict[str, Any]:
        """How far the stream is, as plain JSON values."""
        return {"format_version": _FORMAT, "seed": self._seed, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with samples not drawn before; they are not the ones that would have come.

        Raises:
            DataError: the state is of an indexed run, or damaged.
        """
        batches = state.get("batches")
        if state.get("format_version") != _FORMAT or not isinstance(batches, int) or batches < 0:
            raise DataError(
                "can't resume the stream: the run was begun on indexed shards; give --data.index as it had, or start anew"
            )
        self._batches = batches
