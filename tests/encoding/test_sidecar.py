from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from latent_writer import digest
from made_output import Made

from latentae.encoding.sidecar import (
    FORMAT_VERSION,
    Sidecar,
    packed_name,
    parse_sidecar,
    read_sidecar,
    sidecar_name,
    write_sidecar,
)
from latentae.models.latent_statistics import LatentStatistics


@pytest.fixture(params=["disk", "memory"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    out = tmp_path / "out" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/out"
    return Made(out, tmp_path / "in", packed=True, flip=True)


def test_round_trip(made: Made) -> None:
    for name, sidecar in made.sidecars.items():
        assert read_sidecar(made.store, name) == sidecar
        assert sidecar.format_version == FORMAT_VERSION == 2
        before = made.store.read(sidecar_name(name))
        write_sidecar(made.store, sidecar)
        assert made.store.read(f"{name}.done.json") == before
    assert len(made.sidecars["deep/c.tar"].packed) == 2
    assert read_sidecar(made.store, "other.tar") is None
    assert packed_name("x/a.tar", 32, 48) == packed_name("x/a", 32, 48) == "x/a.latents-32x48.safetensors"


def test_sizes_must_fit(made: Made) -> None:
    packed = made.sidecars["deep/c.tar"].packed[0].name
    data = made.store.read(packed) or b""
    made.replace(packed, data[:-1])
    assert read_sidecar(made.store, "deep/c.tar") is None
    made.store.remove(packed)
    assert read_sidecar(made.store, "deep/c.tar") is None
    made.replace(packed, data)
    assert read_sidecar(made.store, "deep/c.tar") is not None
    made.replace("a.tar", b"longer" * 10_000)
    assert read_sidecar(made.store, "a.tar") is None


def test_every_flipped_bit_is_noticed(made: Made) -> None:
    data = made.store.read("a.tar.done.json") or b""
    for byte in range(len(data)):
        flipped = bytearray(data)
        flipped[byte] ^= 1 << (byte % 8)
        assert parse_sidecar(bytes(flipped), "a.tar") is None, data[max(0, byte - 20) : byte + 20]


def test_damaged_and_odd_ones_and_those_of_others_are_none(made: Made) -> None:
    for data in (None, b"", b"[]", b"null", b"{}", b'{"format_version": 2}', b"\xff", b"12"):
        assert parse_sidecar(data, "a.tar") is None
    assert parse_sidecar(made.store.read("a.tar.done.json"), "deep/c.tar") is None
    write_sidecar(made.store, made.sidecars["a.tar"].model_copy(update={"statistics": {"mean": [1.0]}}))
    assert read_sidecar(made.store, "a.tar") is None


def test_the_first_format_is_read() -> None:
    file = {"samples": 0, "bytes": 10, "sha256": digest(b"")}
    old = {
        "format_version": 1,
        "shard": "a.tar",
        "fingerprint": "f",
        "input": file,
        "output": file,
        "skipped": {},
        "batch_size": 16,
        "statistics": LatentStatistics.empty(2).to_json(),
    }
    sidecar = parse_sidecar(json.dumps(old).encode(), "a.tar")
    assert isinstance(sidecar, Sidecar)
    assert (sidecar.packed, sidecar.flip, sidecar.batch_sizes) == ([], False, [])
