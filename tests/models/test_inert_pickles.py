"""Pickled checkpoints that name classes of their trainer are read, and no code of a file runs."""

from __future__ import annotations

import collections
import copyreg
import io
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from small_models import equal

from latentae.errors import ModelError
from latentae.models import pickled
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.ldm import to_ldm
from latentae.models.weight_files import read_tensors

LIGHTNING = "lightning_of_2021"
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.arange(3).half()}


@pytest.fixture
def trainer(monkeypatch):
    """Classes of a trainer that is gone when the file is read."""
    module = types.ModuleType(LIGHTNING)

    class ModelCheckpoint:
        def __init__(self, state):
            self.__dict__.update(state)

        def __setstate__(self, state):
            raise AssertionError("code of the file ran")

    class AttributeDict(dict):
        pass

    class Names(list):
        pass

    for kind in (ModelCheckpoint, AttributeDict, Names):
        kind.__module__, kind.__qualname__ = LIGHTNING, kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, LIGHTNING, module)
    return module


def lightning(trainer, state):
    """A checkpoint as Lightning 1.4 writes it, with what LDM's configs add."""
    return {
        "epoch": 3,
        "state_dict": collections.OrderedDict(state),
        "callbacks": {
            trainer.ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "best_k": np.float64(0.5)}
        },
        "optimizer_states": [
            {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"betas": (0.5, 0.9)}]}
        ],
        "hyper_parameters": trainer.AttributeDict(
            ckpt=trainer.ModelCheckpoint({"mode": "min"}), names=trainer.Names("ab")
        ),
        "seen": {1, 2},
    }


FORMATS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", FORMATS)
def test_a_checkpoint_of_lightning_is_read(how, trainer, tmp_path, monkeypatch, capsys):
    torch.save(lightning(trainer, STATE), tmp_path / "last.ckpt", **FORMATS[how])
    monkeypatch.delitem(sys.modules, LIGHTNING)
    found = read_tensors(tmp_path / "last.ckpt")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) and found[key].dtype == STATE[key].dtype for key in STATE)
    assert LIGHTNING not in sys.modules
    assert (
        "last.ckpt: left out epoch, callbacks, optimizer_states, hyper_parameters and 1 more"
        in capsys.readouterr().err
    )


def test_an_ldm_checkpoint_of_lightning_is_a_model(trainer, tmp_path, monkeypatch):
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    model = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(32, 32), **levels))
    state = to_ldm(
        {key: torch.nn.Parameter(value) for key, value in model.state_dict().items()}, model.config
    )
    torch.save(lightning(trainer, {**state, "loss.logvar": torch.zeros(())}), tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, LIGHTNING)
    assert equal(AutoencoderKL.from_pretrained(tmp_path / "last.ckpt"), model)


class Call:
    """Pickles as a call of `function`, with an optional state, items and keys."""

    def __init__(self, function, arguments, *more):
        self.made = (function, arguments, *more)

    def __reduce__(self):
        return self.made


def _attack(name: str, made) -> Call:
    touch = f"open({str(made)!r}, 'w').close()"
    attacks = {
        "exec": Call(exec, (touch,)),
        "eval": Call(eval, (touch,)),
        "import": Call(__import__, ("antigravity",)),
        "open": Call(open, (str(made), "w")),
        "popen": Call(subprocess.Popen, ([sys.executable, "-c", touch],)),
        "getattr": Call(getattr, (Call(__import__, ("os",)), "mkdir")),
        "torch.load": Call(torch.load, (str(made),)),
        "state": Call(exec, ("pass",), {"x": 1}),
        "state of a function": Call(getattr, (exec, "x"), (None, {"__doc__": touch})),
        "items": Call(exec, (touch,), None, iter([1, 2]), iter([("a", 1)])),
        "chain": Call(Call, (Call(exec, (touch,)), (Call(exec, (touch,)),))),
    }
    return attacks[name]


ATTACKS = ["exec", "eval", "import", "open", "popen", "getattr", "torch.load", "state", "state of a function",
           "items", "chain"]  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_entry_runs_nothing_and_the_weights_are_read(name, legacy, tmp_path, monkeypatch):
    file, made = tmp_path / "model.ckpt", tmp_path / "made"
    torch.save(
        {"callbacks": _attack(name, made), "state_dict": STATE},
        file,
        _use_new_zipfile_serialization=not legacy,
    )
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    found = read_tensors(file)
    assert equal(found, STATE)
    assert not made.exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_weight_is_refused_by_name(name, tmp_path):
    file, made = tmp_path / "model.ckpt", tmp_path / "made"
    torch.save({"state_dict": {**STATE, "c.weight": _attack(name, made)}}, file)
    with pytest.raises(ModelError, match=r"model\.ckpt: c\.weight is a .*expected a dense tensor") as caught:
        read_tensors(file)
    assert "\n" not in str(caught.value)
    assert not made.exists()


@pytest.mark.parametrize("name", ["exec", "chain"])
def test_an_attack_does_what_it_says_to_those_who_load_it_so(name, tmp_path):
    pickle.loads(pickle.dumps(_attack(name, tmp_path / "made")))
    assert (tmp_path / "made").exists()


def stream(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


@pytest.mark.parametrize(
    "operations",
    [
        (b"cposix\nsystem\n", b"(X\x0b\x00\x00\x00touch MADE ", b"t", b"R"),
        (b"(cposix\nsystem\nX\x0b\x00\x00\x00touch MADE ", b"o"),
        (b"(X\x0b\x00\x00\x00touch MADE iposix\nsystem\n",),
        (b"csubprocess\nPopen\n", b"(X\x0a\x00\x00\x00touch MADE", b"t", b"\x81"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"}", b"b"),
        (b"ccollections\nOrderedDict\n", b"}X\x01\x00\x00\x00aK\x01s", b"b"),
        (b"\x82\xf0",),
    ],
    ids=[
        "call",
        "object",
        "instance",
        "new object",
        "state of an allowed function",
        "state of an allowed class",
        "registry",
    ],
)
def test_the_operations_of_a_pickle_call_nothing(operations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("posix", "system"))
    data = stream(b"}X\x04\x00\x00\x00call", *operations, b"s")
    result = pickled._InertUnpickler(io.BytesIO(data)).load()
    assert list(result) == ["call"]
    assert not list(tmp_path.iterdir())
    assert vars(torch._utils._rebuild_tensor_v2) == before
    assert 0xF0 not in copyreg._extension_cache


def test_archives_that_hold_code_or_paths_are_refused(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: ran.append("TorchScript"))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *args, **kwargs: ran.append("tar"))
    torch.save({"state_dict": STATE}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt", "a") as archive:
        archive.writestr("model/constants.pkl", stream(b"}"))
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        archive.add(tmp_path / "model.pt", "../storages")
    for name in ("model.pt", "tar.pt"):
        with pytest.raises(ModelError, match=rf"could not read .*{name}"):
            read_tensors(tmp_path / name)
    assert not ran


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": STATE, "ema": STATE}, r"several dicts of tensors \(model, ema\)"),
        ({"epoch": 3, "step": torch.tensor(3)}, "no dict of tensors"),
        (torch.nn.Linear(2, 2), r"holds a torch\.nn\.modules\.linear\.Linear, no state dict"),
        ({**STATE, "c": torch.eye(3).to_sparse()}, r"c is a .*sparse.*expected a dense tensor"),
        ({**STATE, "c": torch.zeros(1).expand(4)}, "c is a view that repeats its values"),
        ({**STATE, "c": np.zeros(3)}, r"c is a numpy.*expected a dense tensor"),
    ],
)
def test_what_is_no_state_dict_is_named(content, message, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=message) as caught:
        read_tensors(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state_dict", "model", "module", "params"])
def test_the_only_dict_of_tensors_is_the_state_dict(name, tmp_path):
    torch.save(
        {name: STATE, "step": torch.tensor(3), "optimizer": {"state": {0: {"step": torch.zeros(3)}}}},
        tmp_path / "model.pt",
    )
    assert read_tensors(tmp_path / "model.pt").keys() == STATE.keys()
