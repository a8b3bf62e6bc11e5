"""Read pickled checkpoints as plain tensors without running any code of the file.

torch's restricted unpickler reads most files. It refuses those that name classes of a trainer, such
as the callbacks of Lightning 1.4 in LDM's own checkpoints. These files are read a second time with
an inert stand-in for every unknown class or function. Nothing is imported. Only OrderedDict and
torch's functions that rebuild a dense tensor are called.
"""

from __future__ import annotations

import collections
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from latentae.errors import ModelError, first_line

__all__ = ["PICKLES", "read_pickle"]

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_STATE = "state_dict"


def read_pickle(file: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickled checkpoint, and the names of its other entries.

    The tensors are the file's own, those of its "state_dict", or those of its only dict of tensors.

    Raises:
        ModelError: the file is damaged, holds no dict of tensors or several, or a weight is not a
            plain tensor.
    """
    content = _content(file)
    if not isinstance(content, dict):
        what = content.name if isinstance(content, _Inert) else type(content).__name__
        raise ModelError(
            f"could not read {file}: it holds a {what}, no state dict; save the model's state_dict()"
        )
    state, rest = content, []
    nested = [key for key, value in content.items() if _is_state(value)]
    if _STATE in nested or not _is_state(content):
        if _STATE not in nested and len(nested) != 1:
            several = f"several dicts of tensors ({', '.join(map(str, nested))})"
            found = several if nested else "no dict of tensors"
            raise ModelError(f"{file} holds {found}; save the one state dict that you want in its own file")
        name = _STATE if _STATE in nested else nested[0]
        state, rest = content[name], [str(key) for key in content if key != name]
    tensors = {}
    for key, value in state.items():
        if isinstance(value, Tensor | _Inert):
            tensors[str(key)] = _plain(value, key, file)
        else:
            rest.append(str(key))
    return tensors, rest


def _is_state(value: Any) -> bool:
    """Whether this is a dict of weights; a count of steps, without dimensions, is no weight."""
    return isinstance(value, dict) and any(isinstance(item, Tensor) and item.ndim for item in value.values())


def _plain(value: Tensor | _Inert, key: Any, file: str | Path) -> Tensor:
    """Check that a tensor is dense with its own values; a stride of zero can claim terabytes."""
    if isinstance(value, _Inert):
        found = f"a {value.name}"
    elif value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        found = f"a tensor of layout {value.layout}, type {value.dtype}, on {value.device.type}"
    elif value.nbytes > value.untyped_storage().nbytes():
        found = "a view that repeats its values"
    else:
        return value
    raise ModelError(
        f"{file}: {key} is {found}, expected a dense tensor; save the weights again as .safetensors"
    )


def _content(file: str | Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the unpickler fail in any way
        try:
            return _inert_content(file)
        except Exception:
            reason = f"{type(error).__name__}: {first_line(error).partition('. ')[0][:200]}"
            raise ModelError(
                f"could not read {file} as plain tensors ({reason}); the file is damaged or of an unknown "
                "format, use another copy"
            ) from error


def _inert_content(file: str | Path) -> Any:
    """The content: torch reads the container and values, `_InertUnpickler` the pickle."""
    with Path(file).open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"  # as torch decides
    if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(file)).get_all_records():
        raise pickle.UnpicklingError("a TorchScript archive, which holds code")
    if tarfile.is_tarfile(file):
        raise pickle.UnpicklingError("a tar archive of torch before 0.1.10")
    module = SimpleNamespace(
        __name__=__name__,
        Unpickler=_InertUnpickler,
        load=lambda *args, **kw: _InertUnpickler(*args, **kw).load(),
    )
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=module)


class _Inert:
    """An inert class, function or object: keeps its name, takes any call and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def append(self, value: Any) -> None:
        """Ignore an item."""

    extend = append
    add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item."""


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """A dense tensor without its `requires_grad`, hooks and metadata."""
    return torch._utils._rebuild_tensor(storage, offset, size, stride)  # pyright: ignore[reportAttributeAccessIssue]


_CALLED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}


class _InertUnpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Python's unpickler, which calls only the functions in _CALLED."""

    stack: list[Any]
    append: Callable[[Any], None]
    dispatch: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]

    def find_class(self, module: str, name: str) -> Any:
        """A function of _CALLED, or a stand-in; nothing is imported."""
        return _CALLED.get((module, name)) or _Inert(f"{module}.{name}")

    def _called(self, function: Any, args: Any) -> Any:
        if any(function is known for known in _CALLED.values()):
            return function(*args)
        return function if isinstance(function, _Inert) else _Inert(type(function).__name__)

    def get_extension(self, code: int) -> None:
        """A stand-in for an object of this process's registry, which is not read."""
        self.append(_Inert(f"extension {code}"))

    def load_reduce(self) -> None:
        """A call."""
        args = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], args)

    def load_newobj(self) -> None:
        """A new object of a class."""
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        """A new object of a class, with keyword arguments."""
        self.stack.pop()
        self.load_reduce()

    def _instantiate(self, klass: Any, args: Any) -> None:
        """A new object of a class, in the oldest protocols."""
        self.append(self._called(klass, args))

    def load_build(self) -> None:
        """Ignore an object's state."""
        self.stack.pop()

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
