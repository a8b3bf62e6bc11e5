"""What one finished latent shard holds: its samples, their members and tensors, checked as they are read."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor

from latentae.data.sources import read_range
from latentae.data.tars import Problem, Reader, Sample, group, walk
from latentae.encoding.places import JSON_MEMBER, LATENT_MEMBER
from latentae.encoding.sidecar import Sidecar, packed_name
from latentae.encoding.store import Store
from latentae.errors import ShardError

__all__ = ["ShardContents", "local_files", "shard_contents"]


@contextmanager
def local_files(store: Store, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Files of a store by name, on this machine: themselves, or temporary copies of remote ones."""
    if store.is_local:
        yield {name: store.local(name) for name in names}
        return
    with tempfile.TemporaryDirectory(prefix="latentae-") as folder:
        copies = {name: Path(folder) / str(number) for number, name in enumerate(names)}
        for name, copy in copies.items():
            with store.reader(name) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)
        yield copies


@contextmanager
def shard_contents(store: Store, sidecar: Sidecar) -> Iterator[ShardContents]:
    """The contents of the shard that a sidecar is of.

    Raises:
        ShardError: here or while reading, where the shard is damaged.
    """
    names = [sidecar.shard, *(file.name for file in sidecar.packed)]
    with (
        local_files(store, names) as files,
        ShardContents(store.show(sidecar.shard), sidecar, files) as contents,
    ):
        yield contents


class ShardContents:
    """A latent shard, read in the order of its tar; packed files stay open meanwhile.

    Args:
        shown: what messages call it.
        sidecar: of the shard.
        files: where the tar and its packed files lie on this machine, by name.
    """

    def __init__(self, shown: str, sidecar: Sidecar, files: Mapping[str, Path]) -> None:
        self.shown, self.sidecar = shown, sidecar
        self._files, self._open, self._stack = files, {}, ExitStack()

    def __enter__(self) -> ShardContents:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def samples(self) -> Iterator[Sample]:
        """Key and members of each sample; ShardError where the tar is damaged, or holds something that is no part of a sample."""
        path = self._files[self.sidecar.shard]

        def fetch(start: int, stop: int) -> bytes:
            return read_range(str(path), start, stop)

        problems: list[Problem] = []
        for sample in group(
            walk(Reader(fetch, path.stat().st_size, chunk=1 << 13), self.shown), problems.append
        ):
            self._refuse(problems)
            yield sample
        self._refuse(problems)

    def _refuse(self, problems: list[Problem]) -> None:
        if problems:
            raise ShardError(
                f"{self.shown} holds {problems[0].name!r}, which has no place there ({problems[0].reason})"
            )

    def read(self, sample: Sample, extension: str) -> bytes:
        """The bytes of a member; ShardError if the sample has none of this name."""
        for name, offset, size in sample.members:
            if name == extension:
                return read_range(str(self._files[self.sidecar.shard]), offset, offset + size)
        raise ShardError(f"sample {sample.key!r} in {self.shown} has no {extension}")

    def info(self, sample: Sample) -> dict[str, Any]:
        """What `latent.json` says of the image."""
        try:
            info = json.loads(self.read(sample, JSON_MEMBER))
            return dict(info)
        except (ValueError, TypeError) as error:
            raise ShardError(
                f"the {JSON_MEMBER} of sample {sample.key!r} in {self.shown} can't be read ({error})"
            ) from error

    def tensors(self, sample: Sample, info: Mapping[str, Any]) -> dict[str, Tensor]:
        """`mean`, `logvar` and, where mirrored images were encoded too, `mean_flip`, `logvar_flip`: [z, h, w] as stored."""
        try:
            if not self.sidecar.packed:
                return load_safetensors(self.read(sample, LATENT_MEMBER))
            height, width = info["bucket"]
            file = self.packed(packed_name(self.sidecar.shard, height, width))
            return {name: file.get_slice(name)[int(info["row"])] for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
            raise ShardError(
                f"the latent of sample {sample.key!r} in {self.shown} can't be read ({error!r})"
            ) from error

    def packed(self, name: str) -> Any:
        """A packed file, open; KeyError if the sidecar lists none of this name."""
        if name not in self._open:
            self._open[name] = self._stack.enter_context(safe_open(self._files[name], framework="pt"))
        return self._open[name]
