"""Files of named tensors: safetensors, pickles, and shards with an index; and which of their tensors a model takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentae.errors import ModelError, some
from latentae.files import read_json
from latentae.models.pickled import PICKLES, read_pickle
from latentae.progress import note

__all__ = [
    "is_index",
    "is_weights_file",
    "note_left_out",
    "prefix_before",
    "read_tensors",
    "split_unknown",
    "weight_parts",
]

# what torch.compile, DDP, FSDP and activation checkpointing put into the name of a parameter
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_PREFIXES = (
    "",
    "first_stage_model.",
    "vae.",
)  # an autoencoder alone, a latent diffusion model, a bundle of components

# Of a file of an autoencoder: what its training used, which no encoder or decoder reads.
_TRAINING = (
    "loss.", "discriminator.", "model_ema.", "foundation_model.", "linear_proj.", "colorize", "n_averaged", "scale_factor",
)  # fmt: skip
_AUTOENCODER = (
    "encoder.",
    "decoder.",
    "quant_conv.",
    "post_quant_conv.",
    "bn.",
)  # no other component has these names


def is_index(file: str | Path) -> bool:
    """Whether a file's name is that of an index of shards, such as `diffusion_pytorch_model.safetensors.index.json`."""
    name = Path(file).name
    return ".index." in name and name.endswith(".json")


def is_weights_file(file: str | Path) -> bool:
    """Whether a file's name is one that `read_tensors` reads."""
    return Path(file).suffix in (".safetensors", *PICKLES) or is_index(file)


def weight_parts(file: str | Path) -> list[Path]:
    """The files that hold the tensors of `file`: itself, or the shards of an index.

    Raises:
        ModelError: the index is damaged, or a shard is missing.
    """
    file = Path(file)
    if not is_index(file):
        return [file]
    names = sorted(set(_index(file).values()))
    missing = [name for name in names if not file.with_name(name).is_file()]
    if missing:
        raise ModelError(
            f"{file} names {some(missing)}, which {'are' if missing[1:] else 'is'} not in its folder; fetch all shards"
        )
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
    """All tensors in a file of weights or in the shards of an index; of pickled files without running any code.

    Names lose what torch.compile (`_orig_mod.`), DDP (`module.`) and FSDP add. Entries of a pickled file that are no tensors are
    logged once.

    Raises:
        ModelError: a file is damaged, can't be read, or its names repeat or differ from the index.
    """
    file = Path(file)
    found: dict[str, Tensor] = {}
    where = _index(file) if is_index(file) else {}
    for part in weight_parts(file):
        for key, value in _read(part).items():
            if where and where.get(key) != part.name:
                raise ModelError(
                    f"{part} holds {key}, which {file.name} expects in {where.get(key, 'no shard')}; fetch them again"
                )
            found[key] = value
    if where.keys() - found.keys():
        raise ModelError(
            f"the shards of {file} lack {some(sorted(where.keys() - found.keys()))}; fetch them again"
        )
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in tensors:
            raise ModelError(
                f"{file} holds {name} more than once, with and without a wrapper's prefix; keep one of them"
            )
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


def prefix_before(keys: Iterable[str], mark: str) -> str | None:
    """What is before the key `mark` of an autoencoder in a file: nothing, or the name that its program gave it; None without the key.

    Raises:
        ModelError: the file holds several autoencoders.
    """
    found = sorted({key.removesuffix(mark) for key in keys if key == mark or key.endswith(f".{mark}")})
    known = [prefix for prefix in _PREFIXES if prefix in found]
    if not known and len(found) > 1:
        raise ModelError(
            f"it holds several autoencoders, under {some(found)}; save the one that you want in a file of its own"
        )
    return (known or found or [None])[0]


def split_unknown(keys: Iterable[str], used: Collection[str], prefix: str = "") -> tuple[list[str], str]:
    """The tensors of a file that a model of its shape does not have, and the harmless ones that it leaves out, in words.

    Harmless are what a training used (`loss.*`, `model_ema.*`, ...), and behind a prefix of the autoencoder the other components.

    Args:
        keys: of the file, complete.
        used: those that the model takes.
        prefix: of the autoencoder's keys in the file.
    """
    left = [key for key in keys if key not in used]
    inside = [key for key in left if key.startswith(prefix)]
    unknown = [key for key in inside if not key.removeprefix(prefix).startswith(_TRAINING)]
    unknown += [key for key in left if not key.startswith(prefix) and key.startswith(_AUTOENCODER)]
    names = [key.removeprefix(prefix) for key in left if key not in set(unknown)]
    harmless = Counter(f"{name.split('.')[0]}.*" if "." in name else name for name in names)
    return unknown, some(
        [f"{name} ({count})" if count > 1 else name for name, count in harmless.most_common()]
    )


def note_left_out(file: str | Path, harmless: str) -> None:
    """Log once which tensors of a file no model takes."""
    if harmless:
        note(f"{file}: left out {harmless}, which the autoencoder does not use")
