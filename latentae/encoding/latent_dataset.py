"""Read latents back: `LatentDataset`, random access to an output of `encode`.

posterior        mean, logvar [z, h, w], raw, as stored
sample           z = mean + exp(logvar / 2) * eps,  eps ~ N(0, 1) keyed by (seed, epoch, index)
scaled           (z - shift_factor) * scaling_factor, the input of a diffusion model
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from latentae import keyed
from latentae.data.sources import read_range
from latentae.data.tars import Reader, group, walk
from latentae.encoding.latent_shard import (
    BAD_LABEL,
    CLASS_NUMBERS,
    JSON_MEMBER,
    LATENT_MEMBER,
    SampleIndex,
    join,
    label_of,
    scan_shard,
)
from latentae.encoding.sidecar import Sidecar, listed_shards, open_output, read_sidecars
from latentae.encoding.store import Store
from latentae.errors import DataError, OutputError, ShardError
from latentae.file_names import STATISTICS

__all__ = ["Latent", "LatentDataset", "LatentSample", "SizeBatches", "decode_latent"]

_THREADS = 8  # that scan shards


class Latent(NamedTuple):
    """One posterior, or a batch of them after torch's default collate."""

    key: str
    mean: Tensor
    """[z, h, w] fp32."""
    logvar: Tensor
    """[z, h, w] fp32."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + sigma * normal noise, drawn on the CPU so that a seed works on any device."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class LatentSample(NamedTuple):
    """One drawn latent, or a batch of them after torch's default collate."""

    key: str
    latent: Tensor
    """[z, h, w] fp32."""
    label: int
    """Class label, -1 without one."""


class LatentDataset(Dataset[Any]):
    """The latents in an output folder of `encode`, in the order of its shards.

    Shards are indexed once, with about 50 bytes per sample. Latents are read on access. Workers of
    a DataLoader may be forked or spawned.

    Args:
        path: a finished output of `encode`: a folder or an fsspec URL.
        scaled: return (z - shift_factor) * scaling_factor, the input of a diffusion model, instead
            of raw latents. Mean and logvar are then those of the scaled latent.
        sample: items are LatentSample, drawn again in each epoch, instead of Latent (posteriors).
        flip: use the latent of the flipped image half of the time. Needs `encode --flip`.
        seed: of noise and flips, which are functions of (seed, epoch, index) in any worker.
        labels: read class labels. False gives -1, for data whose labels are not class numbers.
        transform: called with each item; its result is the item.

    Raises:
        DataError: from `labels` and items with `sample`, if a label is not a class number.
        OutputError: `path` is no finished output of encode, or has no flips although `flip` is set.
        ShardError: a shard is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        scaled: bool = False,
        sample: bool = False,
        flip: bool = False,
        seed: int = 0,
        labels: bool = True,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.path, self.scaled, self.sampled, self.flip = path, scaled, sample, flip
        self.transform = transform
        self.seed = keyed.whole_seed(seed)
        store, self.record = open_output(path)
        if not self.record.get("finished"):
            raise OutputError(f"{store.shown} is not finished; run the same encode command again")
        self.statistics = _read_statistics(store)
        if scaled and self.statistics["scaling_factor"] is None:
            raise OutputError(
                f"the latents in {store.shown} are constant, so they have no scaling factor; use scaled=False"
            )
        sidecars = _sidecars(store)
        self.flips: bool = all(sidecar.flip for sidecar in sidecars if sidecar.output.samples)
        if flip and not self.flips:
            raise OutputError(
                f"{store.shown} has no latents of flipped images; encode again with --flip, or use flip=False"
            )
        self.shards: list[str] = [sidecar.shard for sidecar in sidecars]
        self.digest = _digest(sidecars)
        self._paths = [store.address(shard) for shard in self.shards]
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(pool.map(partial(scan_shard, store.address), sidecars))
        self._samples = join(parts)
        if not labels:
            self._samples.rows["label"] = -1
        self._first = np.cumsum([0, *(len(part.rows) for part in parts)])
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # running workers see a new epoch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._epoch.is_shared():  # after a plain pickle
            self._epoch.share_memory_()

    def __len__(self) -> int:
        return len(self._samples.rows)

    def __getitem__(self, index: int) -> Any:
        index = self._index(index)
        return self._item(index, self.posterior(index, flip=self._flipped(index)))

    def _flipped(self, index: int) -> bool:
        return self.flip and keyed.derive_seed("latent flip", self.seed, self.epoch, index) % 2 == 1

    def _item(self, index: int, latent: Latent) -> Any:
        """Convert a raw posterior to the item."""
        if self.scaled:
            logvar = latent.logvar + 2 * math.log(self.statistics["scaling_factor"])
            latent = Latent(latent.key, self.scale(latent.mean), logvar)
        item: Any = latent
        if self.sampled:
            label = int(self._samples.rows["label"][index])
            if label == BAD_LABEL:
                raise self._bad_label(index)
            generator = keyed.generator("latent noise", self.seed, self.epoch, index)
            item = LatentSample(latent.key, latent.sample(generator), label)
        return item if self.transform is None else self.transform(item)

    def _bad_label(self, index: int) -> DataError:
        members = self.members(index)
        try:
            label_of(members.get("cls"), members.get("json"))
            found = "a json that is too long to search for a label"
        except ValueError as error:
            found = str(error)
        sample = f"sample {self._samples.key(index)!r} of {self.shards[self._shard(index)]}"
        return DataError(f"{sample} has {found}, {CLASS_NUMBERS}, or open the data set with labels=False")

    def _index(self, index: int) -> int:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} of {len(self)} latents")
        return number % len(self)

    def set_epoch(self, epoch: int) -> None:
        """Draw other noise and flips from now on, also in running workers."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch, from 0; see `set_epoch`."""
        return int(self._epoch)

    @property
    def keys(self) -> Sequence[str]:
        """The keys of all samples, created on access."""
        return _Keys(self._samples)

    @property
    def labels(self) -> np.ndarray:
        """Class labels, int64 [n], from `cls` or the "label" in `json`; -1 without one.

        Raises:
            DataError: a label is not a class number, such as a word.
        """
        labels = self._samples.rows["label"]
        bad = np.flatnonzero(labels == BAD_LABEL)
        if len(bad):
            raise self._bad_label(int(bad[0]))
        return labels

    @property
    def sizes(self) -> np.ndarray:
        """Height and width in pixels of each encoded image, int64 [n, 2]."""
        rows = self._samples.rows
        return np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)

    @property
    def shard_ranges(self) -> list[range]:
        """The indices of the samples of each shard."""
        return [range(int(a), int(b)) for a, b in zip(self._first[:-1], self._first[1:], strict=True)]

    def posterior(self, index: int, *, flip: bool = False) -> Latent:
        """The raw posterior of a sample as stored, regardless of `scaled`.

        Args:
            index: of the sample.
            flip: return the posterior of the flipped image.

        Raises:
            ShardError: the shard can't be read or has changed.
        """
        index = self._index(index)
        key, row = self._samples.key(index), self._samples.rows[index]
        if row["file"] >= 0:
            file, number = self._samples.files[row["file"]], int(row["latent"])
            return Latent(key, *(file.read(name, number) for name in _names(flip)))
        begin, shard = int(row["start"]) + int(row["latent"]), self._shard(index)
        data = read_range(self._paths[shard], begin, begin + int(row["size"]))
        return _unpack(key, data, self.shards[shard], flip)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def members(self, index: int) -> dict[str, bytes]:
        """Every member of a sample in the tar, by extension, as stored.

        Raises:
            ShardError: the shard can't be read or has changed.
        """
        index = self._index(index)
        row, shard, key = self._samples.rows[index], self._shard(index), self._samples.key(index)
        start = int(row["start"])
        stop = start + int(row["span"])
        data = read_range(self._paths[shard], start, stop)
        reader = Reader(lambda a, b: data[a - start : b - start], stop, start=start)
        samples = list(group(walk(reader, self.shards[shard], whole=False), lambda problem: None))
        if len(samples) != 1 or samples[0].key != key:
            raise _changed(self.shards[shard], key)
        return {
            name: data[offset - start : offset - start + size] for name, offset, size in samples[0].members
        }

    def meta(self, index: int) -> dict[str, Any]:
        """The metadata of a sample by extension, with its key as `__key__`.

        `latent.json` (original size and crop of the image) and `json` are parsed, `txt` and
        `caption` are text, `cls` is a number. Members that can't be parsed stay bytes; others are
        left out.

        Raises:
            ShardError: the shard can't be read or has changed.
        """
        found: dict[str, Any] = {"__key__": self._samples.key(self._index(index))}
        for extension, data in self.members(index).items():
            if extension in _READERS:
                try:
                    found[extension] = _READERS[extension](data)
                except ValueError:
                    found[extension] = data
        return found

    def scale(self, latent: Tensor) -> Tensor:
        """(z - shift_factor) * scaling_factor: zero mean and unit variance over the data set."""
        return (latent - self.statistics["shift_factor"]) * self.statistics["scaling_factor"]

    def unscale(self, latent: Tensor) -> Tensor:
        """The inverse of `scale`: the input of `AutoencoderKL.decode`."""
        return latent / self.statistics["scaling_factor"] + self.statistics["shift_factor"]

    def webdataset(self, **options: Any) -> Any:
        """The same samples in order as a `WebDataset` pipeline of dicts.

        Each dict has `__key__`, `item` (the item of this data set, with the same draw, scaling and
        transform) and the sample's other members as bytes. Without this package, read the tars with
        `WebDataset(urls).decode(decode_latent)`.

        Args:
            options: of `webdataset.WebDataset`, such as `shardshuffle=100` or
                `nodesplitter=webdataset.split_by_node`.
        """
        from webdataset.compat import WebDataset

        options = {"shardshuffle": False, "empty_check": False, **options}
        return WebDataset(list(self._paths), **options).map(_ItemOf(self))


class SizeBatches(Sampler[list[int]]):
    """A DataLoader's `batch_sampler` for several image sizes: each batch has latents of one size.

    Args:
        dataset: gives sizes, seed and epoch.
        batch_size: latents per batch.
        shuffle: random order, a function of (seed, epoch). False keeps the order, size by size.
        drop_last: drop the incomplete last batch of each size.
    """

    def __init__(
        self, dataset: LatentDataset, batch_size: int, *, shuffle: bool = True, drop_last: bool = True
    ) -> None:
        self._dataset, self._batch_size = dataset, batch_size
        self._shuffle, self._drop_last = shuffle, drop_last
        _, size = np.unique(dataset.sizes, axis=0, return_inverse=True)
        order = np.argsort(size.reshape(-1), kind="stable")
        bounds = np.cumsum(np.bincount(size.reshape(-1)))[:-1]
        self._groups = [torch.from_numpy(part) for part in np.split(order, bounds)]

    def __len__(self) -> int:
        extra = 0 if self._drop_last else self._batch_size - 1
        return sum((len(group) + extra) // self._batch_size for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        generator = keyed.generator("latent batches", self._dataset.seed, self._dataset.epoch)

        def mixed(count: int) -> Tensor:
            return torch.randperm(count, generator=generator) if self._shuffle else torch.arange(count)

        batches = [
            batch
            for group in self._groups
            for batch in group[mixed(len(group))].split(self._batch_size)
            if len(batch) == self._batch_size or not self._drop_last
        ]
        order = mixed(len(batches)).tolist()
        return (batches[number].tolist() for number in order if len(batches[number]))


class _Keys(Sequence[str]):
    def __init__(self, samples: SampleIndex) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        wanted = range(len(self))[index]
        return self._samples.key(wanted) if isinstance(wanted, int) else [self[number] for number in wanted]


class _ItemOf:
    """Adds the data set's item to webdataset's samples. Keeps the keys of one shard at a time."""

    def __init__(self, dataset: LatentDataset) -> None:
        self._dataset, self._url = dataset, ""
        self._numbers = {path: number for number, path in enumerate(dataset._paths)}
        self._indices: dict[str, int] = {}

    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]:
        dataset, url, key = self._dataset, str(raw["__url__"]), raw["__key__"]
        if url != self._url:
            rows = dataset.shard_ranges[self._numbers[url]]
            self._url, self._indices = url, {dataset.keys[index]: index for index in rows}
        if key not in self._indices:
            raise _changed(url, key)
        index = self._indices[key]
        data, flip = raw.pop(LATENT_MEMBER, None), dataset._flipped(index)
        latent = dataset.posterior(index, flip=flip) if data is None else _unpack(key, data, url, flip)
        return {**raw, "item": dataset._item(index, latent)}


def decode_latent(key: str, data: bytes) -> dict[str, Tensor] | None:
    """Handler for webdataset's `decode`: the tensors of `latent.safetensors`, else None."""
    return load_safetensors(data) if key.lstrip(".") == LATENT_MEMBER else None


_READERS: dict[str, Callable[[bytes], Any]] = {
    JSON_MEMBER: json.loads,
    "json": json.loads,
    "txt": bytes.decode,
    "caption": bytes.decode,
    "cls": int,
}


def _names(flip: bool) -> tuple[str, str]:
    return ("mean_flip", "logvar_flip") if flip else ("mean", "logvar")


def _unpack(key: str, data: bytes, shard: str, flip: bool) -> Latent:
    try:
        tensors = load_safetensors(data)
        return Latent(key, *(tensors[name].float() for name in _names(flip)))
    except (SafetensorError, KeyError) as error:
        raise _changed(shard, key) from error


def _changed(shard: str, key: str) -> ShardError:
    return ShardError(f"shard {shard} has changed: the latent of {key!r} has moved; open the data set again")


def _sidecars(store: Store) -> list[Sidecar]:
    """The sidecars of all shards, in the order of their names."""
    sizes = store.sizes()
    shards = listed_shards(sizes)
    found: list[Sidecar] = []
    for shard, sidecar in zip(shards, read_sidecars(store, shards, sizes), strict=True):
        if sidecar is None:
            raise ShardError(
                f"{store.show(shard)} does not match its sidecar, one of them is damaged; run the same "
                "encode command again"
            )
        found.append(sidecar)
    return found


def _digest(sidecars: Sequence[Sidecar]) -> str:
    """Hex digest of all shards, from the hashes in their sidecars."""
    facts = [[one.shard, one.output.sha256, *(file.sha256 for file in one.packed)] for one in sidecars]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_statistics(store: Store) -> dict[str, Any]:
    try:
        return json.loads(store.read(STATISTICS) or b"")
    except ValueError as error:
        raise OutputError(
            f"could not read {store.show(STATISTICS)} ({error}); run the same encode command again"
        ) from error
