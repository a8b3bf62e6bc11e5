"""Reading latents back: `LatentDataset`, random access to what `encode` wrote.

posterior        mean, logvar [z, h, w], as stored (raw)
sample           z = mean + exp(logvar / 2) * eps,  eps ~ N(0, 1) keyed by (seed, epoch, index)
scaled           (z - shift_factor) * scaling_factor, what a diffusion model sees
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.utils.data import Dataset

from latentae.data.sources import read_range
from latentae.data.tars import Reader, group, walk
from latentae.encoding.places import (
    BAD_LABEL,
    CLASS_NUMBERS,
    JSON_MEMBER,
    LATENT_MEMBER,
    PackedLayout,
    Places,
    join,
    label_of,
    scan_places,
)
from latentae.encoding.sidecar import SUFFIX, Sidecar, fits, parse_sidecar, sidecar_name
from latentae.encoding.store import Store
from latentae.errors import DataError, OutputError, ShardError
from latentae.file_names import STATISTICS
from latentae.keyed import derive_seed, whole_seed

__all__ = ["Latent", "LatentDataset", "LatentSample", "decode_latent"]

_THREADS = 8  # that scan shards; they wait for disks and servers
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Latent(NamedTuple):
    """One posterior, or after torch's default collate a batch of them."""

    key: str
    mean: Tensor
    """[z, h, w] fp32."""
    logvar: Tensor
    """[z, h, w] fp32."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + sigma * standard normal noise, drawn on the CPU so that a seed means the same everywhere."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)


class LatentSample(NamedTuple):
    """One drawn latent, or after torch's default collate a batch of them."""

    key: str
    latent: Tensor
    """[z, h, w] fp32."""
    label: int
    """Class label, -1 where the sample has none."""


class LatentDataset(Dataset[Any]):
    """The latents in an output folder of `encode`, in the order of its shards, by index.

    Shards are scanned once, on construction, into arrays of some fifty bytes a sample; latents are read when asked for. Nothing is
    kept open that a worker of a DataLoader, forked or spawned, could not have.

    Args:
        path: a finished output of `encode`: a folder or an fsspec URL.
        scaled: give (z - shift_factor) * scaling_factor, as a diffusion model sees it, instead of raw latents: mean and logvar
            are those of the scaled latent.
        sample: items are LatentSample, drawn anew in each epoch, instead of the posteriors, which are Latent.
        flip: take the latent of the mirrored image half of the time; it must have been stored (`encode --flip`).
        seed: of noise and flips; both are functions of (seed, epoch, index), whichever worker draws them.
        labels: read class labels; False gives -1 for every sample, for data whose labels are no class numbers.
        transform: called with each item; what it returns is the item.

    Raises:
        DataError: from `labels` and from items with `sample`, where a label is no class number.
        OutputError: `path` is no output of encode, is not finished, or holds no flips where they are wanted.
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
        self.path, self.scaled, self.sampled, self.flip, self.transform = (
            path,
            scaled,
            sample,
            flip,
            transform,
        )
        self.seed = whole_seed(seed)
        store = Store.open(path)
        record = store.record()
        if record.get("verb") != "encode":
            raise OutputError(
                f"{store.shown} was made by latentae {record.get('verb')}; give an output folder of latentae encode"
            )
        if not record.get("finished"):
            raise OutputError(f"{store.shown} is not finished; run the same encode command again")
        self.record: dict[str, Any] = record
        self.statistics = _read_statistics(store)
        if scaled and self.statistics["scaling_factor"] is None:
            raise OutputError(
                f"the latents in {store.shown} do not vary, so they have no scaling factor; use scaled=False"
            )
        sidecars = _sidecars(store)
        self.flips: bool = all(sidecar.flip for sidecar in sidecars if sidecar.output.samples)
        if flip and not self.flips:
            raise OutputError(
                f"{store.shown} holds no latents of mirrored images; encode again with --flip, or use flip=False"
            )
        self.shards: list[str] = [sidecar.shard for sidecar in sidecars]
        self.digest = _digest(sidecars)
        path_of = _addresses(store, path)
        self._paths = [path_of(shard) for shard in self.shards]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(lambda sidecar: scan_places(path_of, sidecar), sidecars))
        self._files: list[PackedLayout] = [layout for _, layouts in found for layout in layouts]
        self._places: Places = join([places for places, _ in found], [len(layouts) for _, layouts in found])
        if not labels:
            self._places = replace(self._places, label=np.full_like(self._places.label, -1))
        self._first = np.cumsum([0, *(len(places) for places, _ in found)])
        self._epoch = torch.zeros(
            1, dtype=torch.int64
        ).share_memory_()  # workers that live on see a new epoch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._epoch.is_shared():  # it came through a plain pickle
            self._epoch.share_memory_()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        index = self._index(index)
        latent = self.posterior(index, flip=self.flip and self._seed("flip", index) % 2 == 1)
        return self._finish(index, latent)

    def _finish(self, index: int, latent: Latent) -> Any:
        """A raw posterior -> the item."""
        if self.scaled:
            logvar = latent.logvar + 2 * math.log(self.statistics["scaling_factor"])
            latent = Latent(latent.key, self.scale(latent.mean), logvar)
        item: Any = latent
        if self.sampled:
            generator = torch.Generator().manual_seed(self._seed("noise", index) >> 1)  # torch takes 63 bits
            item = LatentSample(latent.key, latent.sample(generator), self._label(index))
        return item if self.transform is None else self.transform(item)

    def _label(self, index: int) -> int:
        label = int(self._places.label[index])
        if label == BAD_LABEL:
            raise self._no_class(index)
        return label

    def _no_class(self, index: int) -> DataError:
        members = self.members(index)
        try:
            label_of(members.get("cls"), members.get("json"))
            found = "a json that is too long to look for a label in"
        except ValueError as error:
            found = str(error)
        sample = f"sample {self._places.key(index)!r} of {self.shards[self._shard(index)]}"
        return DataError(f"{sample} has {found}, {CLASS_NUMBERS}, or open the data set with labels=False")

    def _seed(self, purpose: str, index: int) -> int:
        return derive_seed(f"latent {purpose}", self.seed, self.epoch, index)

    def _index(self, index: int) -> int:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} of {len(self)} latents")
        return number % len(self)

    def set_epoch(self, epoch: int) -> None:
        """Other noise and other flips from now on, in living workers too."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """What `set_epoch` said last, from 0."""
        return int(self._epoch)

    @property
    def keys(self) -> Sequence[str]:
        """The keys of all samples; each is made when it is asked for."""
        return _Keys(self._places)

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]: the class labels, from a sample's `cls` or the "label" of its `json`; -1 where it has none.

        Raises:
            DataError: a label is no class number, such as a word.
        """
        bad = np.flatnonzero(self._places.label == BAD_LABEL)
        if len(bad):
            raise self._no_class(int(bad[0]))
        return self._places.label

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n, 2]: height and width in pixels of the image that each latent shows. Latents of one size can be batched."""
        return np.stack([self._places.height, self._places.width], axis=1).astype(np.int64)

    @property
    def shard_ranges(self) -> list[range]:
        """The indices of the samples of each shard."""
        return [range(int(a), int(b)) for a, b in zip(self._first[:-1], self._first[1:], strict=True)]

    def posterior(self, index: int, *, flip: bool = False) -> Latent:
        """The posterior of a sample as it is stored, raw, whatever `scaled` is.

        Args:
            index: of the sample.
            flip: the one of the mirrored image.

        Raises:
            ShardError: the shard can't be read or has changed.
        """
        index, places = self._index(index), self._places
        key, number = places.key(index), int(places.file[index])
        if number >= 0:
            names = ("mean_flip", "logvar_flip") if flip else ("mean", "logvar")
            mean, logvar = (self._row(self._files[number], name, int(places.where[index])) for name in names)
            return Latent(key, mean, logvar)
        begin = int(places.start[index]) + int(places.where[index])
        shard = self._shard(index)
        return _unpack(
            key,
            read_range(self._paths[shard], begin, begin + int(places.size[index])),
            self.shards[shard],
            flip,
        )

    def _row(self, layout: PackedLayout, name: str, row: int) -> Tensor:
        dtype = _DTYPES[layout.dtype]
        length = math.prod(layout.shape) * dtype.itemsize
        begin = layout.begins[name] + row * length
        data = bytearray(read_range(layout.path, begin, begin + length))
        return torch.frombuffer(data, dtype=dtype).reshape(layout.shape).float()

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def members(self, index: int) -> dict[str, bytes]:
        """Every member of a sample in the tar, by its extension, as stored.

        Raises:
            ShardError: the shard can't be read or has changed.
        """
        index = self._index(index)
        start, shard = int(self._places.start[index]), self._shard(index)
        stop = start + int(self._places.span[index])
        data = read_range(self._paths[shard], start, stop)
        reader = Reader(lambda a, b: data[a - start : b - start], stop, start=start)
        samples = list(group(walk(reader, self.shards[shard], whole=False), lambda problem: None))
        if len(samples) != 1 or samples[0].key != self._places.key(index):
            raise _changed(self.shards[shard], self._places.key(index))
        return {
            name: data[offset - start : offset - start + size] for name, offset, size in samples[0].members
        }

    def meta(self, index: int) -> dict[str, Any]:
        """What is known of a sample besides its latent, by extension.

        `latent.json` (what the image was and which part of it was encoded) and `json` as values, `txt` and `caption` as text, `cls`
        as a number; `__key__` is its key. Members that can't be read as such stay bytes, and other members are left out.

        Raises:
            ShardError: the shard can't be read or has changed.
        """
        found: dict[str, Any] = {"__key__": self._places.key(self._index(index))}
        for extension, data in self.members(index).items():
            read = _READERS.get(extension)
            if read is not None:
                try:
                    found[extension] = read(data)
                except ValueError:
                    found[extension] = data
        return found

    def scale(self, latent: Tensor) -> Tensor:
        """Raw latents -> (z - shift_factor) * scaling_factor, zero mean and unit variance over the data set."""
        return (latent - self.statistics["shift_factor"]) * self.statistics["scaling_factor"]

    def unscale(self, latent: Tensor) -> Tensor:
        """The inverse of `scale`: what `AutoencoderKL.decode` takes."""
        return latent / self.statistics["scaling_factor"] + self.statistics["shift_factor"]

    def webdataset(self, **options: Any) -> Any:
        """The same samples read in order by webdataset, as a `WebDataset` pipeline of dicts.

        Each dict has `__key__`, `item` (what this data set has at that place: same draw, scaling and transform) and the sample's
        other members as bytes. The tars can be read without us too: `WebDataset(urls).decode(decode_latent)`.

        Args:
            options: of `webdataset.WebDataset`, such as `shardshuffle=100` or `nodesplitter=webdataset.split_by_node`.
        """
        from webdataset.compat import WebDataset

        options = {"shardshuffle": False, "empty_check": False, **options}
        return WebDataset(list(self._paths), **options).map(_ItemOf(self))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


class _Keys(Sequence[str]):
    def __init__(self, places: Places) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        wanted = range(len(self))[index]
        return (
            self._places.key(wanted)
            if isinstance(wanted, int)
            else [self._places.key(number) for number in wanted]
        )


class _ItemOf:
    """A sample as webdataset reads it -> the same with the data set's item. It knows the keys of one shard at a time."""

    def __init__(self, dataset: LatentDataset) -> None:
        self._dataset, self._url = dataset, ""
        self._numbers = {path: number for number, path in enumerate(dataset._paths)}
        self._indices: dict[str, int] = {}

    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]:
        dataset, url = self._dataset, str(raw["__url__"])
        if url != self._url:
            rows = dataset.shard_ranges[self._numbers[url]]
            self._url, self._indices = url, {dataset.keys[index]: index for index in rows}
        if raw["__key__"] not in self._indices:
            raise _changed(url, raw["__key__"])
        index = self._indices[raw["__key__"]]
        data = raw.pop(LATENT_MEMBER, None)
        mirrored = dataset.flip and dataset._seed("flip", index) % 2 == 1
        latent = (
            dataset.posterior(index, flip=mirrored)
            if data is None
            else _unpack(raw["__key__"], data, url, mirrored)
        )
        return {**raw, "item": dataset._finish(index, latent)}


def decode_latent(key: str, data: bytes) -> dict[str, Tensor] | None:
    """A handler for webdataset's `decode`: the member `latent.safetensors` -> its tensors; None for every other member."""
    return load_safetensors(data) if key.lstrip(".") == LATENT_MEMBER else None


_READERS: dict[str, Callable[[bytes], Any]] = {
    JSON_MEMBER: json.loads,
    "json": json.loads,
    "txt": bytes.decode,
    "caption": bytes.decode,
    "cls": int,
}


def _unpack(key: str, data: bytes, shard: str, flip: bool) -> Latent:
    try:
        tensors = load_safetensors(data)
        return Latent(
            key, *(tensors[name + ("_flip" if flip else "")].float() for name in ("mean", "logvar"))
        )
    except (SafetensorError, KeyError) as error:
        raise _changed(shard, key) from error


def _changed(shard: str, key: str) -> ShardError:
    return ShardError(
        f"shard {shard} has changed: the latent of {key!r} is not where it was; open the data set again"
    )


def _addresses(store: Store, path: str | Path) -> Callable[[str], str]:
    """Name in the store at `path` -> path or URL."""
    url = str(path).rstrip("/")
    return lambda name: str(store.local(name)) if store.is_local else f"{url}/{name}"


def _sidecars(store: Store) -> list[Sidecar]:
    """What vouches for the shards, in the order of their names."""
    sizes = store.sizes()
    shards = sorted(name.removesuffix(SUFFIX) for name in sizes if name.endswith(SUFFIX))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda shard: parse_sidecar(store.read(sidecar_name(shard)), shard), shards)
        sidecars = list(zip(shards, found, strict=True))
    for shard, sidecar in sidecars:
        if sidecar is None or not fits(sidecar, sizes):
            raise ShardError(
                f"{store.show(shard)} does not fit its sidecar, one of them is damaged; run the same encode command again"
            )
    return [sidecar for _, sidecar in sidecars if sidecar is not None]


def _digest(sidecars: Sequence[Sidecar]) -> str:
    """Hex digest of all shards by what their sidecars say: other bytes have another one."""
    facts = [[one.shard, one.output.sha256, *(file.sha256 for file in one.packed)] for one in sidecars]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read_statistics(store: Store) -> dict[str, Any]:
    try:
        return json.loads(store.read(STATISTICS) or b"")
    except ValueError as error:
        raise OutputError(
            f"could not read {store.show(STATISTICS)} ({error}); run the same encode command again, which restores it"
        ) from error
