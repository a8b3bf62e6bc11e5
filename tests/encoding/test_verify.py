from __future__ import annotations

import json
import random
import shutil
import uuid
from itertools import count
from pathlib import Path

import fsspec
import pytest
import torch
from latent_writer import tar_bytes
from made_output import Made, latents
from safetensors.torch import save

from latentae import encode
from latentae.encoding import store as store_module
from latentae.encoding.plan import Shard, find_finished
from latentae.encoding.sidecar import write_sidecar
from latentae.encoding.store import open_store
from latentae.encoding.verify import verify
from latentae.errors import OutputError, ShardError
from latentae.models.latent_statistics import LatentStatistics

KINDS = {
    "plain": {},
    "packed": {"packed": True, "flip": True, "dtype": "bf16"},
    "images": {"keep_images": True, "dtype": "fp16", "skipped": {"a.tar": ["a/bad"]}},
}


@pytest.fixture(params=["disk", "memory"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    return tmp_path / "out" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/out"


@pytest.fixture
def made(out: str | Path, tmp_path: Path) -> Made:
    return Made(out, tmp_path / "in", keep_images=True).finish()


def problems(made: Made, deep: bool = True, **options) -> list[str]:
    """What is found, each with its shard, nothing being changed."""
    before = {name: made.store.read(name) for name in made.store.sizes()}
    report = verify(made.out, deep, forget=False, **options)
    assert {name: made.store.read(name) for name in made.store.sizes()} == before
    assert report.ok == (not report.faults)
    return [str(fault) for fault in report.faults]


def pending(made: Made) -> list[str]:
    """What an encode command would make again."""
    plan = [
        Shard("", name, sidecar.input.samples, sidecar.input.bytes)
        for name, sidecar in sorted(made.sidecars.items())
    ]
    return [
        shard.name
        for shard, sidecar in find_finished(made.store, plan, "f" * 64, made.store.sizes())
        if sidecar is None
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_output(out: str | Path, tmp_path: Path, kind: str) -> None:
    made = Made(out, tmp_path / "in", **KINDS[kind]).finish()
    for deep in (False, True):
        for shards in (None, [str(path) for path in made.sources.values()]):
            report = verify(made.out, deep, shards=shards)
            assert [str(fault) for fault in report.faults] == []
            assert report.ok
            assert (report.shards, report.samples, report.forgotten) == (3, 8, [])
            sizes = made.store.sizes().items()
            assert report.bytes == sum(
                size for name, size in sizes if name.endswith((".tar", ".safetensors"))
            )
    assert made.store.record()["finished"]


def test_any_flipped_bit_is_found(out: str | Path, tmp_path: Path) -> None:
    made = Made(out, tmp_path / "in", packed=True, counts={"a.tar": 2, "b.tar": 0}).finish()
    rng = random.Random(0)
    for name in made.store.sizes():
        if name == "latentae.json":
            continue
        before = made.store.read(name) or b""
        for _ in range(6):
            made.flip_bit(name, rng.randrange(len(before)), rng.randrange(8))
            assert problems(made), name
            made.replace(name, before)
    assert problems(made) == []


def test_a_damaged_shard_counts_as_not_done(made: Made) -> None:
    made.flip_bit("deep/c.tar", 2000)
    assert verify(made.out).ok  # sizes fit
    report = verify(made.out, deep=True)
    assert report.faults[0].shard == "deep/c.tar"
    assert "deep/c.tar has other bytes than were written" in report.faults[0].problem
    assert report.forgotten == ["deep/c.tar"]
    assert report.samples == 3
    assert pending(made) == ["deep/c.tar"]
    assert not made.store.record()["finished"]
    made.write("deep/c.tar", 5)  # as encode does
    made.finish()
    assert verify(made.out, deep=True).ok


def test_encode_repairs_what_verify_finds(
    kept: Path, model: Path, photos: Path, tmp_path: Path, snapshot
) -> None:
    assert [str(fault) for fault in verify(kept, deep=True, shards=photos).faults] == []
    out, good, rng = shutil.copytree(kept, tmp_path / "out"), snapshot(kept), random.Random(1)
    for name in good:
        if name != "latentae.json":
            data = bytearray(good[name])
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (out / name).write_bytes(data)
    assert not verify(out, deep=True).ok
    options = {"packed": True, "flip": True, "keep_images": True}
    assert encode(model, photos, out, dtype="fp32", batch_size=4, device="cpu", **options)["finished"]
    assert snapshot(out) == good
    assert verify(out, deep=True).ok


def test_what_is_not_done(made: Made) -> None:
    made.store.remove("a.tar.done.json")
    made.store.remove("deep/b.tar")
    made.replace("deep/c.tar", b"cut short")
    faults = problems(made, deep=False)
    assert faults == [
        "a.tar: it has no sidecar, so it is not done",
        "deep/b.tar: deep/b.tar is missing",
        f"deep/c.tar: deep/c.tar has 9 bytes, expected {made.sidecars['deep/c.tar'].output.bytes}",
        "0 of 3 shards are done; run the same encode command again",
    ]
    made.store.remove("deep/c.tar")
    made.store.remove("deep/c.tar.done.json")
    assert "1 of 3" not in problems(made)[-1]
    assert "deep/c.tar: it is not done" in problems(
        made, shards=[str(path) for path in made.sources.values()]
    )


def test_an_output_that_is_not_finished(out: str | Path, tmp_path: Path) -> None:
    made = Made(out, tmp_path / "in", packed=True)
    assert problems(made) == [
        "all shards are done, but the job is not closed; run the same encode command again"
    ]
    made.store.remove("a.latents-32x32.safetensors")
    assert problems(made)[0] == "a.tar: a.latents-32x32.safetensors is missing"
    made.store.remove("a.tar.done.json")
    report = verify(made.out)
    assert [str(fault) for fault in report.faults] == [
        "a.tar: it has no sidecar, so it is not done",
        "2 of 3 shards are done; run the same encode command again",
    ]


def test_statistics_of_the_output(made: Made) -> None:
    found = json.loads(made.store.read("statistics.json") or b"")
    good = made.store.read("statistics.json") or b""
    for name, value in {
        "scaling_factor": 1.0,
        "skipped": 1,
        "model": "x",
        "dtype": "bf16",
        "fingerprint": "e",
    }.items():
        made.replace("statistics.json", json.dumps({**found, name: value}).encode())
        assert problems(made) == [
            "statistics.json is missing, damaged or not the sum of the sidecars; "
            "run the same encode command again"
        ]
    made.store.remove("statistics.json")
    assert len(problems(made)) == 1
    made.replace("statistics.json", good)
    assert problems(made) == []


def test_a_shard_of_another_job_and_what_is_no_output(made: Made, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="damaged or not of latentae"):
        verify(tmp_path)
    (tmp_path / "latentae.json").write_text('{"format_version": 1, "verb": "train", "inputs": {}}')
    with pytest.raises(OutputError, match="was written by latentae train"):
        verify(tmp_path)
    write_sidecar(made.store, made.sidecars["a.tar"].model_copy(update={"fingerprint": "e" * 64}))
    assert problems(made)[0].startswith("a.tar: it is of another job than most shards here")
    write_sidecar(made.store, made.sidecars["a.tar"].model_copy(update={"shard": "new.tar"}))
    made.replace("new.tar", made.store.read("a.tar") or b"")
    assert "there are 4 shards, expected 3; some are of another job" in problems(made)


def test_counts_in_a_sidecar(made: Made) -> None:
    good = made.sidecars["a.tar"]
    write_sidecar(made.store, good.model_copy(update={"skipped": {"unreadable image": ["a/000"]}}))
    faults = problems(made)
    assert "a.tar: its sidecar counts 3 latents and 1 skipped of 3 samples" in faults
    assert "a.tar: sample 'a/000' is present, but its sidecar lists it as skipped" in faults
    write_sidecar(made.store, good.model_copy(update={"statistics": LatentStatistics.empty(3).to_json()}))
    assert "a.tar: its statistics are of 0 latents, expected 3" in problems(made, deep=False)
    part = LatentStatistics.from_json(good.statistics)
    off = {**part.to_json(), "m2": (part.m2 * (1 + 1e-5)).tolist()}
    write_sidecar(made.store, good.model_copy(update={"statistics": off}))
    assert "a.tar: the statistics in its sidecar do not match its latents (m2)" in problems(made)


def members(made: Made, **changes: bytes | None) -> dict[str, bytes]:
    """The members of a shard of one sample, some of them others."""
    tensors = latents(0, (32, 32), "fp32", flip=False)
    info = {"source": "jpg", "source_sha256": made.sidecars["a.tar"].input.sha256, "bucket": [32, 32]}
    found = {"latent.safetensors": save(tensors), "latent.json": json.dumps(info).encode(), "txt": b"x"}
    found |= {name.replace("_", "."): data for name, data in changes.items()}
    return {f"k.{name}": data for name, data in found.items() if data is not None}


def tensors(**changes: torch.Tensor) -> bytes:
    return save({**latents(0, (32, 32), "fp32", flip=False), **changes})


def numbers(*shape: int, fill: float = 0.0) -> torch.Tensor:
    return torch.full(shape, fill)


INFO = {"source": "jpg", "source_sha256": "", "bucket": [32, 32]}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"latent_json": None}, "has no latent.json"),
        ({"latent_safetensors": None}, "has no latent.safetensors"),
        ({"latent_safetensors": b"\0" * 20}, "can't be read"),
        ({"latent_json": b"{"}, "can't be read"),
        ({"latent_json": b"[1]"}, "can't be read"),
        ({"latent_json": b"{}"}, "does not have the crop"),
        (
            {"latent_safetensors": save({"mean": numbers(3, 4, 4)})},
            "it has the tensors ['mean'], expected ['logvar', 'mean']",
        ),
        ({"latent_safetensors": tensors(mean_flip=numbers(3, 4, 4))}, "expected ['logvar', 'mean']"),
        ({"latent_safetensors": tensors(mean=numbers(3, 4, 5))}, "expected one [3, h, w]"),
        (
            {"latent_safetensors": tensors(mean=numbers(2, 4, 4), logvar=numbers(2, 4, 4))},
            "expected one [3, h, w]",
        ),
        (
            {"latent_safetensors": tensors(mean=numbers(3, 2, 4), logvar=numbers(3, 2, 4))},
            "2 x 4 for an image of 32 x 32",
        ),
        (
            {"latent_safetensors": tensors(mean=numbers(3, 4, 4).half())},
            "its mean is torch.float16, expected torch.float32",
        ),
        ({"latent_safetensors": tensors(mean=numbers(3, 4, 4, fill=float("nan")))}, "its mean is not finite"),
        (
            {"latent_safetensors": tensors(logvar=numbers(3, 4, 4, fill=float("inf")))},
            "its logvar is not finite",
        ),
        ({"latent_safetensors": tensors(mean=numbers(3, 4, 4))}, "do not match its latents (mean)"),
        ({"jpg": b"other"}, "its jpg is not the image that latent.json names"),
        ({}, "its image (jpg) is missing"),
    ],
)
def test_samples_that_are_wrong_from_the_start(
    tmp_path: Path, changes: dict[str, bytes | None], problem: str
) -> None:
    """The sidecar's hash fits: whoever wrote them was wrong."""
    made = Made(tmp_path / "out", tmp_path / "in", counts={"a.tar": 1}, keep_images=not changes)
    good = latents(0, (32, 32), "fp32", flip=False)
    made.place(
        "a.tar", tar_bytes(members(made, **changes)), 1, LatentStatistics.of(good["mean"], good["logvar"]), []
    )
    made.finish()
    assert verify(made.out).ok
    faults = problems(made)
    assert any(problem in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("tar", "problem"),
    [
        (b"", "is an empty file"),
        (b"x" * 1024, "is not a complete, uncompressed tar"),
        (tar_bytes({}), "it holds 0 samples, expected 1"),
        (tar_bytes({"k.latent.json": b"{}"})[:-9728], "damaged"),
        (tar_bytes({"k.txt": b"", "l.txt": b"", "k.json": b"{}"}), "holds 'k', which does not belong there"),
        (tar_bytes({"k.txt": b"", "README": b""}), "holds 'README', which does not belong there"),
    ],
)
def test_tars_that_are_wrong_from_the_start(tmp_path: Path, tar: bytes, problem: str) -> None:
    made = Made(tmp_path / "out", tmp_path / "in", counts={"a.tar": 1})
    made.place("a.tar", tar, 1, LatentStatistics.empty(3), [])
    made.finish()
    faults = problems(made)
    assert any(problem in fault for fault in faults), faults


def test_packed_rows(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", tmp_path / "in", packed=True, counts={"a.tar": 4}).finish()
    sidecar = made.sidecars["a.tar"]
    info = {**INFO, "row": 0}
    swapped = {
        f"{made.key('a.tar', n)}.latent.json": json.dumps({**info, "row": 1 - n // 2}).encode()
        for n in (0, 2)
    }
    swapped |= {
        f"{made.key('a.tar', n)}.latent.json": json.dumps({**info, "row": 7}).encode() for n in (1, 3)
    }
    made.place("a.tar", tar_bytes(swapped), 4, LatentStatistics.from_json(sidecar.statistics), sidecar.packed)
    faults = problems(made)
    assert "a.tar: sample 'a/000': its row is 1, expected 0" in faults
    assert any("the latent of sample 'a/001'" in fault and "can't be read" in fault for fault in faults)
    assert "a.tar: a.latents-24x40.safetensors holds 2 latents, 0 of them belong to a sample" in faults
    assert any("statistics" in fault for fault in faults)


def test_inputs_that_changed(made: Made) -> None:
    shards = [str(path) for path in made.sources.values()]
    others = problems(made, shards=shards[1:])
    assert any("match no given input shard" in fault for fault in others)
    data = bytearray(made.sources["a.tar"].read_bytes())
    data[600] ^= 1
    made.sources["a.tar"].write_bytes(data)
    made.sources["deep/c.tar"].write_bytes(bytes(512) * 2)
    shallow = problems(made, deep=False, shards=shards)
    assert [fault.partition(":")[0] for fault in shallow] == ["deep/c.tar"]
    deep = problems(made, shards=shards)
    assert [fault.partition(":")[0] for fault in deep] == ["a.tar", "deep/c.tar"]
    assert "has other bytes than when" in deep[0]
    assert "has 1024 bytes, but" in deep[1]
    assert problems(made) == []
    with pytest.raises(ShardError):
        verify(made.out, shards=made.folder / "nothing.tar")


def test_keys_of_the_input(tmp_path: Path) -> None:
    made = Made(tmp_path / "out", tmp_path / "in").finish()
    source = made.sources["a.tar"]
    source.write_bytes(tar_bytes({f"{made.key('a.tar', number)}.jpg": b"x" for number in (1, 0, 2)}))
    good = made.sidecars["a.tar"]
    made.place("a.tar", made.store.read("a.tar") or b"", 3, LatentStatistics.from_json(good.statistics), [])
    shards = [str(path) for path in made.sources.values()]
    assert problems(made, shards=shards) == [
        "a.tar: its keys differ from those of its input without the skipped ones"
    ]


def test_encoding_to_storage_that_fails(kept: Path, model: Path, photos: Path, monkeypatch) -> None:
    """Uploads fail: some once, one half-written, one for good. Nothing incomplete is left."""
    url = f"memory://{uuid.uuid4().hex}/out"
    options = {
        "dtype": "fp32",
        "batch_size": 4,
        "device": "cpu",
        "packed": True,
        "flip": True,
        "keep_images": True,
    }
    memory = fsspec.get_filesystem_class("memory")
    plain, calls = memory.put_file, count()
    monkeypatch.setattr(store_module, "WAITS", (0.0,))

    def broken(self, source, target, **rest):
        call = next(calls)
        if call == 1 or call >= 3:
            data = Path(source).read_bytes()
            self.pipe_file(target, data[: len(data) // 2])
            raise ConnectionError("reset half way")
        plain(self, source, target, **rest)

    monkeypatch.setattr(memory, "put_file", broken)
    with pytest.raises(OutputError, match=r"could not write .* \(reset half way\) in 2 tries"):
        encode(model, photos, url, **options)
    monkeypatch.setattr(memory, "put_file", plain)
    report = verify(url, deep=True)
    assert not report.ok
    assert all("not done" in fault.problem or "are done" in fault.problem for fault in report.faults), (
        report.faults
    )
    assert report.forgotten == []
    assert encode(model, photos, url, **options)["finished"]
    assert verify(url, deep=True, shards=photos).ok
    here, there = open_store(kept), open_store(url)
    assert {name: there.read(name) for name in there.sizes()} == {
        name: here.read(name) for name in here.sizes()
    }
