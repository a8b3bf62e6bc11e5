"""Files of named tensors: safetensors, pickles, and shards with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentae.errors import ModelError, some
from latentae.files import read_json
from latentae.models.pickled import PICKLES, read_pickle
from latentae.progress import note

__all__ = ["is_weights_file", "read_tensors", "weight_parts"]

# added to the names of parameters by torch.compile, DDP, FSDP and activation checkpointing
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def is_weights_file(file: str | Path) -> bool:
    """Whether a file's name is one that `read_tensors` reads."""
    file = Path(file)
    return file.suffix in (".safetensors", *PICKLES) or _is_index(file)


def _is_index(file: Path) -> bool:
    """Whether a file's name is that of an index, such as `model.safetensors.index.json`."""
    return ".index." in file.name and file.suffix == ".json"


def weight_parts(file: str | Path) -> list[Path]:
    """The files that hold the tensors of `file`: itself, or the shards of an index.

    Raises:
        ModelError: the index is damaged, or a shard is missing.
    """
    file = Path(file)
    if not _is_index(file):
        return [file]
    names = sorted(set(_index(file).values()))
    missing = [name for name in names if not file.with_name(name).is_file()]
    if missing:
        verb = "are" if missing[1:] else "is"
        raise ModelError(f"{file} names {some(missing)}, which {verb} not in its folder; download all shards")
    return [file.with_name(name) for name in names]


def _index(file: Path) -> dict[str, str]:
    try:
        found: Any = read_json(file)["weight_map"]
        if found and all(Path(name).name == name and name not in ("", ".", "..") for name in found.values()):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ModelError(
        f"{file} is no index of shards: it has no weight_map of tensor names to files; use another copy"
    )


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file of weights, or of the shards of an index.

    Pickled files run no code.

    Names lose what torch.compile (`_orig_mod.`), DDP (`module.`) and FSDP add. Entries of a pickled
    file that are not tensors are logged once.

    Raises:
        ModelError: a file is damaged or unreadable, or its names repeat or differ from the index.
    """
    file = Path(file)
    found: dict[str, Tensor] = {}
    where = _index(file) if _is_index(file) else {}
    for part in weight_parts(file):
        for key, value in _read(part).items():
            if where and where.get(key) != part.name:
                shard = where.get(key, "no shard")
                raise ModelError(
                    f"{part} holds {key}, which {file.name} expects in {shard}; download them again"
                )
            found[key] = value
    if lacking := where.keys() - found.keys():
        raise ModelError(f"the shards of {file} lack {some(sorted(lacking))}; download them again")
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in tensors:
            raise ModelError(f"{file} holds {name} more than once, with and without a wrapper; keep one")
        tensors[name] = value
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"could not read {file} ({error}); the file is damaged, use another copy"
            ) from error
    tensors, rest = read_pickle(file)
    if rest:
        note(f"{file}: left out {some(rest)}")
    return tensors
