"""Training on remote shards without an index: webdataset's resampled stream.

It promises less than `TrainLoader`. Samples are drawn shard by shard with replacement, and there
are no epochs. Another number of ranks or workers sees other batches, and a resumed run draws new
samples.
"""

from __future__ import annotations

import itertools
import random
import tarfile
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from latentae.data.decode import Sample
from latentae.data.loader import BadSample, Batch, decode_for_training, from_worker, parallel_batches
from latentae.data.options import DataOptions
from latentae.data.shard_files import READ_EXTENSIONS, RawSample, expand_shards
from latentae.data.shard_index import IndexFiles
from latentae.data.sources import is_remote, shown, stream
from latentae.data.transforms import augment
from latentae.errors import DataError, ImageError, LatentAEError, ShardError, first_line
from latentae.keyed import derive_seed, whole_seed
from latentae.progress import say

__all__ = ["StreamLoader", "streams"]

SHUFFLE = 1000  # encoded samples per worker to draw from
_FORMAT = "stream-1"


def streams(shards: Sequence[str], index: str | None) -> bool:
    """Whether these shards can only be streamed: remote ones without an index."""
    if index is not None or not shards or not is_remote(shards[0]):
        return False
    return IndexFiles(tuple(shards), None).find(shards[0]) is None


class _Stream(IterableDataset):
    def __init__(
        self, shards: Sequence[str], batch_size: int, options: DataOptions, words: tuple[int, ...]
    ) -> None:
        self.shards, self.batch_size, self.options, self.words = list(shards), batch_size, options, words

    def __iter__(self) -> Iterator[Batch | LatentAEError]:
        info = get_worker_info()
        return from_worker(self._batches(derive_seed("stream", *self.words, info.id if info else 0)))

    def _batches(self, seed: int) -> Iterator[Batch]:
        samples: list[Sample] = []
        bad: list[BadSample] = []
        failures = 0
        for number, raw in enumerate(self._samples(seed)):
            try:
                image = decode_for_training(raw, self.options)
                crop = augment(image, self.options, derive_seed("crop", seed, number))
                samples.append(Sample(raw["__key__"], crop))
                failures = 0
            except ImageError as error:
                bad.append(BadSample(raw["__key__"], raw["__url__"], str(error), "the next one", -1, -1))
                failures += 1
                if failures >= self.options.max_bad_in_a_row:
                    advice = f"the last: {error}; check the shards"
                    raise DataError(f"{failures} samples in a row can't be read, {advice}") from error
            if len(samples) == self.batch_size:
                yield Batch.of(samples, bad)
                samples, bad = [], []

    def _samples(self, seed: int) -> Iterator[RawSample]:
        from webdataset.filters import shuffle
        from webdataset.shardlists import ResampledShards

        entries = ResampledShards(self.shards, seed=seed, worker_seed=lambda: 0, deterministic=True)
        every = itertools.chain.from_iterable(_read_stream(entry["url"]) for entry in entries)
        return iter(shuffle(SHUFFLE, initial=min(SHUFFLE, 100), rng=random.Random(seed))(every))


def _read_stream(url: str) -> Iterator[RawSample]:
    """The samples of one shard in order. webdataset neither opens URLs nor decodes here."""
    from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

    def wanted(name: str) -> bool:
        extension = base_plus_ext(name)[1]
        return extension is not None and extension.lower() in READ_EXTENSIONS

    with stream(url) as file:
        members = tar_file_expander([{"url": url, "stream": file}], select_files=wanted)
        try:
            yield from group_by_keys(members)
        except (tarfile.TarError, ValueError, EOFError) as error:
            found = f"shard {shown(url)} could not be read ({first_line(error)})"
            raise ShardError(f"{found}; fetch or write it again, or leave it out") from error


class StreamLoader:
    """Endless training batches of one rank from shards without an index.

    Args:
        options: the `[data]` table; `shards` must name remote shards.
        batch_size: images per step of this rank.
        seed: of the run.
        rank: of this process.

    Raises:
        DataError: aspect-ratio buckets are requested, which need an index.
    """

    epoch = 0

    def __init__(self, options: DataOptions, batch_size: int, seed: int, rank: int = 0) -> None:
        if options.buckets != "none":
            found = f"data.buckets is {options.buckets}, which needs the sizes of all images"
            raise DataError(f"{found}; run `latentae index SHARDS FOLDER` and give --data.index FOLDER")
        self._options, self._batch_size, self._seed, self._rank = options, batch_size, whole_seed(seed), rank
        self._shards, self._batches = expand_shards(str(options.shards)), 0

    def announce(self) -> None:
        """Log what this loader does not promise."""
        say(
            f"data: {len(self._shards)} remote shards without an index are streamed: samples are drawn with "
            "replacement, and only a statistical resume is promised; "
            "`latentae index SHARDS FOLDER` and --data.index FOLDER give the exact order"
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        options = self._options
        words = (self._seed, self._rank, self._batches)  # a resumed run draws anew
        dataset = _Stream(self._shards, self._batch_size, options, words)
        parts = parallel_batches(dataset, options.workers)
        pin = options.workers > 0 and torch.cuda.is_available()
        try:
            for batch in parts:
                self._batches += 1
                yield Batch.join([batch], pin)
        finally:
            parts.close()

    def state_dict(self) -> dict[str, Any]:
        """The number of batches so far, as plain JSON values."""
        return {"format_version": _FORMAT, "seed": self._seed, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume with samples that were not drawn before, other than those of an uninterrupted run.

        Raises:
            DataError: the state is of an indexed run, or damaged.
        """
        batches = state.get("batches")
        if state.get("format_version") != _FORMAT or not isinstance(batches, int) or batches < 0:
            advice = "give its --data.index, or start a new run"
            raise DataError(f"can't resume the stream: the run began on indexed shards; {advice}")
        self._batches = batches
