"""Latent shards on disk: names of their members, and a reader of samples that checks them.

A sample `KEY.jpg, KEY.txt` of an image shard becomes

    KEY.latent.safetensors   mean, logvar[, mean_flip, logvar_flip] [z, h, w], raw, stored type
    KEY.latent.json          original size and the crop that the latent shows
    KEY.txt                  unchanged, as every member except the image, which `keep_images` keeps;
                             extensions become lower case, as WebDataset reads them

A packed shard has no KEY.latent.safetensors. NAME.latents-HxW.safetensors next to the tar stacks
the latents of all images of H x W pixels, and KEY.latent.json has the `row`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor

from latentae.data.sources import read_range, stream
from latentae.data.tars import Problem, Reader, Sample, group, walk
from latentae.encoding.sidecar import Sidecar, packed_name
from latentae.encoding.store import LocalStore, Store
from latentae.errors import ShardError

__all__ = ["JSON_MEMBER", "LATENT_MEMBER", "LatentShard", "bucket_of"]

LATENT_MEMBER, JSON_MEMBER = "latent.safetensors", "latent.json"


def bucket_of(info: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of the encoded image, from `latent.json`."""
    height, width = info["bucket"] if "bucket" in info else info["crop"][2:]  # version 1 had squares only
    return height, width


class LatentShard:
    """`with LatentShard(store, sidecar) as shard:` reads a shard, after copying a remote one.

    Args:
        store: the output.
        sidecar: of the shard.

    Attributes:
        files: local path of the tar and its packed files, by name.

    Raises:
        ShardError: here or while reading, if the shard is damaged.
    """

    def __init__(self, store: Store, sidecar: Sidecar) -> None:
        self.store, self.sidecar, self.shown = store, sidecar, store.show(sidecar.shard)
        self.files: dict[str, Path] = {}
        self._open, self._stack = {}, ExitStack()

    def __enter__(self) -> LatentShard:
        if isinstance(self.store, LocalStore):
            self.files = {name: self.store.path(name) for name in self.sidecar.files}
            return self
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="latentae-"))
            self.files = {name: Path(folder) / str(number) for number, name in enumerate(self.sidecar.files)}
            for name, copy in self.files.items():
                with stream(self.store.address(name)) as source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)  # pyright: ignore[reportArgumentType]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def samples(self) -> Iterator[Sample]:
        """Key and members of each sample; ShardError for a damaged tar or a member of no sample."""
        path = self.files[self.sidecar.shard]
        reader = Reader(
            lambda start, stop: read_range(str(path), start, stop), path.stat().st_size, chunk=1 << 13
        )
        problems: list[Problem] = []
        for sample in group(walk(reader, self.shown), problems.append):
            self._refuse(problems)
            yield sample
        self._refuse(problems)

    def _refuse(self, problems: list[Problem]) -> None:
        if problems:
            raise ShardError(
                f"{self.shown} holds {problems[0].name!r}, which does not belong there ({problems[0].reason})"
            )

    def read(self, sample: Sample, extension: str) -> bytes:
        """The bytes of a member; ShardError if the sample has none with this extension."""
        for name, offset, size in sample.members:
            if name == extension:
                return read_range(str(self.files[self.sidecar.shard]), offset, offset + size)
        raise ShardError(f"sample {sample.key!r} in {self.shown} has no {extension}")

    def info(self, sample: Sample) -> dict[str, Any]:
        """The content of `latent.json`."""
        try:
            return dict(json.loads(self.read(sample, JSON_MEMBER)))
        except (ValueError, TypeError) as error:
            raise ShardError(
                f"the {JSON_MEMBER} of sample {sample.key!r} in {self.shown} can't be read ({error})"
            ) from error

    def tensors(self, sample: Sample, info: Mapping[str, Any]) -> dict[str, Tensor]:
        """`mean`, `logvar` and, if stored, `mean_flip`, `logvar_flip`: raw, [z, h, w]."""
        try:
            if not self.sidecar.packed:
                return load_safetensors(self.read(sample, LATENT_MEMBER))
            name = packed_name(self.sidecar.shard, *bucket_of(info))
            if name not in self._open:
                self._open[name] = self._stack.enter_context(safe_open(self.files[name], framework="pt"))
            file = self._open[name]
            return {name: file.get_slice(name)[int(info["row"])] for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
            raise ShardError(
                f"the latent of sample {sample.key!r} in {self.shown} can't be read ({error!r})"
            ) from error
