"""Reading latents back: `LatentDataset`, random access to what `encode` wrote."""

from __future__ import annotations

import math
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.utils.data import Dataset

from latentae.encoding.shard import LATENT_MEMBER
from latentae.encoding.sidecar import STATISTICS, SUFFIX, read_sidecar
from latentae.errors import OutputError, ShardError
from latentae.files import read_json
from latentae.jobs import Job

__all__ = ["Latent", "LatentDataset"]


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


class LatentDataset(Dataset[Latent]):
    """The latents in an output folder of `encode`, in the order of its shards, by index.

    Offsets are scanned once, on construction; tensors are read when asked for. No file stays open between two reads, so the data
    set can be handed to DataLoader workers of any start method, however many shards there are.

    Args:
        path: a finished output folder of `encode`.
        scaled: give (z - shift_factor) * scaling_factor, as a diffusion model sees it, instead of raw latents: mean and logvar
            are those of the scaled latent.

    Raises:
        OutputError: `path` is no output of encode, or encoding is not finished.
        ShardError: a shard is damaged.
    """

    def __init__(self, path: str | Path, *, scaled: bool = False) -> None:
        self.path, self.scaled = Path(path), scaled
        record = Job.read(self.path)
        if record.get("verb") != "encode":
            raise OutputError(f"{self.path} was made by latentae {record.get('verb')}; give an output folder of latentae encode")
        if not record.get("finished"):
            raise OutputError(f"{self.path} is not finished; run the same encode command again")
        self.statistics = _read_statistics(self.path / STATISTICS)
        if scaled and self.statistics["scaling_factor"] is None:
            raise OutputError(f"the latents in {self.path} do not vary, so they have no scaling factor; use scaled=False")
        self.shards = [marker.with_name(marker.name.removesuffix(SUFFIX)) for marker in self.path.rglob(f"*{SUFFIX}")]
        self.shards.sort(key=lambda shard: shard.relative_to(self.path).as_posix())
        self.keys: list[str] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(self.shards):
            for key, offset, size in _scan(shard):
                self.keys.append(key)
                places.append((number, offset, size))
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)  # shard, offset, size: shared with forked workers

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Latent:
        number, offset, size = (int(value) for value in self._places[index])
        with self.shards[number].open("rb") as file:
            file.seek(offset)
            tensors = load_safetensors(file.read(size))
        mean, logvar = tensors["mean"].float(), tensors["logvar"].float()
        if self.scaled:
            mean, logvar = self.scale(mean), logvar + 2 * math.log(self.statistics["scaling_factor"])
        return Latent(self.keys[index], mean, logvar)

    def scale(self, latent: Tensor) -> Tensor:
        """Raw latents -> (z - shift_factor) * scaling_factor, zero mean and unit variance over the data set."""
        return (latent - self.statistics["shift_factor"]) * self.statistics["scaling_factor"]

    def unscale(self, latent: Tensor) -> Tensor:
        """The inverse of `scale`: what `AutoencoderKL.decode` takes."""
        return latent / self.statistics["scaling_factor"] + self.statistics["shift_factor"]


def _read_statistics(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise OutputError(f"could not read {file} ({error}); run the same encode command again, which restores it") from error


def _scan(shard: Path) -> list[tuple[str, int, int]]:
    """Key, offset and size of every latent in a tar; only headers are read."""
    sidecar = read_sidecar(shard)
    if sidecar is None:
        raise ShardError(f"{shard} does not fit its sidecar, one of them is damaged; run the same encode command again")
    found = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")  # WebDataset's rule: a key ends at the first dot of the file name
                if extension == LATENT_MEMBER:
                    found.append((f"{folder}/{stem}" if folder else stem, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise ShardError(f"{shard} is damaged ({error}); delete it and run the same encode command again") from error
    if len(found) != sidecar.output.samples:
        raise ShardError(f"{shard} holds {len(found)} latents, not {sidecar.output.samples}; delete it and encode again")
    return found
