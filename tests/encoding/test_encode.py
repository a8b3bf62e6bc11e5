from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors

import latentae.encoding.encode as encode_module
from latentae import AutoencoderKL, encode
from latentae.data.decode import decode_image
from latentae.data.transforms import resize_and_center_crop, to_float
from latentae.encoding.latent_dataset import LatentDataset
from latentae.encoding.shard_encoder import ModelEncoder
from latentae.encoding.store import LocalStore
from latentae.errors import DataError, ImageError, ModelError, OutputError, RecipeError, ShardError
from latentae.files import read_json, sha256

OPTIONS = {"dtype": "fp32", "batch_size": 4, "device": "cpu"}


def test_output_mirrors_input(encoded, kept, photos, read_tar):
    """Same shards, keys and order; other members unchanged; no images; plain tar headers."""
    shards = sorted(photos.glob("*.tar"))
    assert [p.name for p in sorted(encoded.glob("*.tar"))] == [p.name for p in shards]
    for shard in shards:
        there, here = read_tar(shard), read_tar(encoded / shard.name)
        keys = [name[: -len(".jpg")] for name in there if name.endswith(".jpg")]
        expected = [
            f"{key}.{part}"
            for key in keys
            for part in ("latent.safetensors", "latent.json", "txt", "seg.bin")
        ]
        assert list(here) == expected
        for name, data in there.items():
            if not name.endswith(".jpg"):
                assert here[name] == data
        with tarfile.open(encoded / shard.name) as tar:
            headers = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
        assert headers <= {(0, 0, 0, "", "", 0o644)}
        assert there.items() <= read_tar(kept / shard.name).items(), "images are kept on request"


def test_latents_are_the_models(encoded, photos, model, read_tar):
    """Stored moments are the model's on the described crop, and decode to its reconstruction."""
    autoencoder = AutoencoderKL.from_pretrained(model)
    images, latents = read_tar(photos / "train-000.tar"), read_tar(encoded / "train-000.tar")
    for name, data in images.items():
        if not name.endswith(".jpg"):
            continue
        key = name[: -len(".jpg")]
        image = decode_image(data, name)
        info = json.loads(latents[f"{key}.latent.json"])
        assert info["original_size"] == list(image.shape[1:])
        assert info["source"] == "jpg"
        resized = F.interpolate(image[None], tuple(info["resized_size"]), mode="bicubic", antialias=True)[0]
        top, left, height, width = info["crop"]
        crop = resized[:, top : top + height, left : left + width]
        assert torch.equal(crop, resize_and_center_crop(image, 32))

        with torch.no_grad():
            output = autoencoder(to_float(crop[None]), sample_posterior=False)
            stored = load_safetensors(latents[f"{key}.latent.safetensors"])
            decoded = autoencoder.decode(stored["mean"][None])
        assert stored["mean"].shape == (3, 8, 8)
        torch.testing.assert_close(stored["mean"], output.posterior.mean[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(stored["logvar"], output.posterior.logvar[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(decoded, output.reconstruction, rtol=0, atol=1e-4)


def test_sidecars_and_statistics(encoded, photos, read_tar):
    means, variances = [], []
    for shard in sorted(encoded.glob("*.tar")):
        record = read_json(f"{shard}.done.json")
        members = read_tar(shard)
        tensors = [load_safetensors(data) for name, data in members.items() if name.endswith(".safetensors")]
        assert record["shard"] == shard.name
        assert record["output"] == {
            "samples": len(tensors),
            "bytes": shard.stat().st_size,
            "sha256": sha256(shard),
        }
        source = photos / shard.name
        assert record["input"] == {
            "samples": len(tensors),
            "bytes": source.stat().st_size,
            "sha256": sha256(source),
        }
        means += [t["mean"].double().numpy() for t in tensors]
        variances += [t["logvar"].double().exp().numpy() for t in tensors]
    mean, variance = np.stack(means), np.stack(variances)
    statistics = read_json(encoded / "statistics.json")
    assert statistics["samples"] == len(means) == 12
    std = np.sqrt(mean.var((0, 2, 3)) + variance.mean((0, 2, 3)))
    np.testing.assert_allclose(statistics["latents_mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics["latents_std"], std, rtol=1e-12)
    np.testing.assert_allclose(
        statistics["scaling_factor"], 1 / np.sqrt(mean.var() + variance.mean()), rtol=1e-12
    )
    np.testing.assert_allclose(statistics["shift_factor"], mean.mean(), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_the_rounded_fp32(dtype, encoded, model, photos, read_tar, tmp_path):
    summary = encode(model, photos, tmp_path / "half", **{**OPTIONS, "dtype": dtype})
    stored = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    full, half = (read_tar(folder / "train-003.tar") for folder in (encoded, tmp_path / "half"))
    values = []
    for name in full:
        if name.endswith(".safetensors"):
            a, b = load_safetensors(full[name]), load_safetensors(half[name])
            assert torch.equal(a["mean"].to(stored), b["mean"])
            assert torch.equal(a["logvar"].to(stored), b["logvar"])
            values.append(b["mean"].double())
    # statistics describe what is stored, not what it was before rounding
    record = read_json(tmp_path / "half/train-003.tar.done.json")["statistics"]
    np.testing.assert_allclose(record["mean"], torch.stack(values).mean((0, 2, 3)).numpy(), rtol=1e-12)
    assert summary["samples"] == 12


def test_tasks_equal_one_run_and_only_the_last_reads_the_sidecars_of_others(
    encoded, model, photos, snapshot, tmp_path, monkeypatch
):
    """Thousands of tasks would ask an object store for each of thousands of sidecars."""
    read: list[str] = []
    real = LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda self, name: read.append(name) or real(self, name))
    found = []
    for task in (2, 0, 3, 1):
        read.clear()
        summary = encode(model, photos, tmp_path / "out", task_id=task, num_tasks=4, **OPTIONS)
        sidecars = {name for name in read if name.endswith(".done.json")}
        found.append((summary["finished"], summary["shards"], len(sidecars)))
    assert found == [(False, 1, 1)] * 3 + [(True, 4, 4)]
    assert snapshot(tmp_path / "out") == snapshot(encoded)


def test_launcher_sets_the_task(encoded, model, photos, snapshot, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert encode(model, photos, tmp_path / "out", **OPTIONS)["shards"] == 2
    monkeypatch.setenv("RANK", "0")
    assert encode(model, photos, tmp_path / "out", **OPTIONS)["finished"]
    assert snapshot(tmp_path / "out") == snapshot(encoded)
    monkeypatch.setenv("WORLD_SIZE", "1")
    encode(model, photos / "train-003.tar", tmp_path / "alone", **OPTIONS)  # batches stay inside a shard
    assert (tmp_path / "alone/train-003.tar").read_bytes() == (encoded / "train-003.tar").read_bytes()


def test_another_batch_size_changes_no_more_than_last_bits(encoded, model, photos, read_tar, tmp_path):
    encode(model, photos, tmp_path / "out", **{**OPTIONS, "batch_size": 3})
    for shard in sorted(encoded.glob("*.tar")):
        one, other = read_tar(shard), read_tar(tmp_path / "out" / shard.name)
        assert list(one) == list(other)
        for name, data in one.items():
            if name.endswith(".safetensors"):
                for part, value in load_safetensors(data).items():
                    torch.testing.assert_close(
                        load_safetensors(other[name])[part], value, rtol=1e-4, atol=1e-4
                    )
            else:
                assert other[name] == data


def test_finished_says_so_and_does_nothing(encoded, model, photos, snapshot, capsys, monkeypatch):
    before = snapshot(encoded)
    monkeypatch.setattr(encode_module, "build_encoder", lambda *arguments: pytest.fail("it was called"))
    reversed_list = [str(path) for path in sorted(photos.glob("*.tar"), reverse=True)]
    for shards in (photos, reversed_list):
        assert encode(model, shards, encoded, **OPTIONS)["finished"]
        assert "already finished" in capsys.readouterr().err
    assert snapshot(encoded) == before


def test_damage_is_redone(encoded, model, photos, snapshot, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    tars = [out / f"train-{number:03}.tar" for number in range(4)]
    sidecars = [Path(f"{tar}.done.json") for tar in tars]
    text = sidecars[0].read_text()
    sidecars[0].write_text(text[: len(text) // 2])
    sidecars[1].write_text(json.dumps({**read_json(sidecars[1]), "fingerprint": "0" * 64}))
    sidecars[2].unlink()
    tars[3].write_bytes(tars[3].read_bytes()[:-512])
    (out / "statistics.json").unlink()
    with pytest.raises(OutputError, match="run the same encode command again"):
        LatentDataset(out)
    encode(model, photos, out, **OPTIONS)
    assert snapshot(out) == snapshot(encoded)
    tars[0].unlink()
    encode(model, photos, out, **OPTIONS)
    assert snapshot(out) == snapshot(encoded)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "bf16"}, "dtype was 'fp32' and is now 'bf16'"),
        ({"compute_dtype": "bf16"}, "compute was 'fp32' and is now 'bf16'"),
        ({"resolution": 64}, "resolution was 32 and is now 64"),
        ({"keep_images": True}, "keep_images"),
        ({"flip": True}, "flip was False"),
        ({"packed": True}, "packed was"),
        ({"buckets": "auto", "resolution": 64}, "resolution was"),
    ],
)
def test_another_job_into_the_same_output_is_refused(change, named, encoded, model, photos, snapshot):
    before = snapshot(encoded)
    with pytest.raises(OutputError, match=named):
        encode(model, photos, encoded, **{**OPTIONS, **change})
    assert snapshot(encoded) == before


def test_another_model_or_other_shards_are_refused(encoded, photos, make_model, model, tmp_path):
    with pytest.raises(OutputError, match="holds another encode job: model was"):
        encode(make_model(tmp_path / "other", 1), photos, encoded, **OPTIONS)
    with pytest.raises(OutputError, match=r"shards.count was 4 and is now 1"):
        encode(model, photos / "train-000.tar", encoded, **OPTIONS)


def test_same_named_shards_of_two_folders_stay_apart_and_may_not_change(
    model, jpeg, write_tar, read_tar, tmp_path
):
    for number, name in enumerate(("a", "b")):
        write_tar(tmp_path / "in" / name / "0.tar", {f"{name}.jpg": jpeg(number, 40, 40)})
    encode(model, [tmp_path / "in/a", tmp_path / "in/b"], tmp_path / "out", **OPTIONS)
    for name in ("a", "b"):
        assert list(read_tar(tmp_path / "out" / name / "0.tar")) == [
            f"{name}.latent.safetensors",
            f"{name}.latent.json",
        ]
    write_tar(tmp_path / "in/a/0.tar", {"a.jpg": jpeg(1, 400, 400)})
    with pytest.raises(OutputError, match=r"shards.digest"):
        encode(model, [tmp_path / "in/a", tmp_path / "in/b"], tmp_path / "out", **OPTIONS)


def test_unreadable_images_are_left_out_and_recorded_up_to_a_share(
    model, jpeg, write_tar, read_tar, snapshot, capsys, tmp_path
):
    folder, out = tmp_path / "in", tmp_path / "out"
    write_tar(folder / "a.tar", {"x.jpg": jpeg(1, 40, 40)})
    write_tar(
        folder / "b.tar",
        {"y.jpg": jpeg(2, 40, 40), "bad.jpg": jpeg(3, 40, 40)[:100], "z.jpg": jpeg(2, 40, 40)},
    )
    with pytest.raises(
        ImageError, match=r"1 of 4 images are unreadable \(0.25 of all.*bad in b\.tar \(image bad in .*b\.tar"
    ) as caught:
        encode(model, folder, out, **OPTIONS)
    assert "\n" not in str(caught.value)
    assert not read_json(out / "latentae.json").get("finished")
    assert not (out / "statistics.json").exists()
    assert "b.tar: skipped 1 (unreadable image): image bad in" in capsys.readouterr().err
    assert read_json(out / "b.tar.done.json")["skipped"] == {"unreadable image": ["bad"]}
    assert [name for name in read_tar(out / "b.tar") if name.endswith(".json")] == [
        "y.latent.json",
        "z.latent.json",
    ]

    before = snapshot(out)
    summary = encode(model, folder, out, max_bad_share=0.25, **OPTIONS)
    assert (summary["samples"], summary["skipped"], summary["finished"]) == (3, 1, True)
    assert {name: data for name, data in snapshot(out).items() if ".tar" in name} == {
        name: data for name, data in before.items() if ".tar" in name
    }


def test_a_shard_without_a_good_image_becomes_an_empty_one(model, jpeg, write_tar, read_tar, tmp_path):
    write_tar(tmp_path / "in/a.tar", {"x.jpg": jpeg(1, 40, 40)})
    write_tar(tmp_path / "in/b.tar", {"y.jpg": b"", "words.txt": b"no image member", "z.png": b"no image"})
    summary = encode(model, tmp_path / "in", tmp_path / "out", max_bad_share=1, packed=True, **OPTIONS)
    assert (summary["samples"], summary["skipped"], summary["finished"]) == (1, 3, True)
    assert read_tar(tmp_path / "out/b.tar") == {}
    record = read_json(tmp_path / "out/b.tar.done.json")
    assert (record["input"]["samples"], record["output"]["samples"], record["packed"]) == (3, 0, [])
    assert record["skipped"] == {"unreadable image": ["y", "words", "z"]}


def test_latent_shards_are_no_input_and_images_no_output(kept, model, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy2(kept / "train-000.tar", tmp_path / "in")
    with pytest.raises(ShardError, match="already holds a latent"):
        encode(model, tmp_path / "in", tmp_path / "out", **OPTIONS)
    with pytest.raises(OutputError, match="already contains"):
        encode(model, tmp_path / "in", tmp_path / "in", **OPTIONS)
    assert (tmp_path / "in/train-000.tar").read_bytes() == (kept / "train-000.tar").read_bytes()


def test_non_finite_latents_are_skipped_and_recorded(model, photos, read_tar, tmp_path, monkeypatch, capsys):
    call = ModelEncoder.__call__

    def sick(self, images):
        mean, logvar = call(self, images)
        mean = mean.clone()
        mean[1, 0, 0, 0] = torch.nan
        return mean, logvar

    monkeypatch.setattr(ModelEncoder, "__call__", sick)
    out = tmp_path / "out"
    summary = encode(model, photos, out, **OPTIONS)
    record = read_json(out / "train-000.tar.done.json")
    assert record["skipped"] == {"non-finite latent": ["photos/0001"]}
    assert (record["input"]["samples"], record["output"]["samples"], record["statistics"]["samples"]) == (
        5,
        4,
        4,
    )
    assert not [name for name in read_tar(out / "train-000.tar") if name.startswith("photos/0001")]
    assert summary["skipped"] == 3
    assert summary["samples"] == 9
    assert "skipped 1 (non-finite latent): photos/0001" in capsys.readouterr().err
    monkeypatch.setattr(
        ModelEncoder, "__call__", lambda self, images: tuple(part * torch.nan for part in call(self, images))
    )
    summary = encode(model, photos, tmp_path / "none", **OPTIONS)
    assert (summary["samples"], summary["skipped"], summary["scaling_factor"]) == (0, 12, None)


def test_bf16_compute_is_close_and_falls_back_to_fp32(model):
    """What CUDA does, on the CPU: autocast, and fp32 for the images whose latents overflow."""
    autoencoder = AutoencoderKL.from_pretrained(model)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    full = ModelEncoder(autoencoder, torch.device("cpu"), "fp32")(images)
    half = ModelEncoder(autoencoder, torch.device("cpu"), "bf16")(images)
    assert half[0].dtype == half[1].dtype == torch.float32
    assert not torch.equal(half[0], full[0])
    for one, other in zip(half, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.1 * float(other.std()))

    def overflow(module, inputs, output):
        if torch.is_autocast_enabled("cpu"):
            output[1] = torch.inf
        return output

    autoencoder.encoder.register_forward_hook(overflow)
    again = ModelEncoder(autoencoder, torch.device("cpu"), "bf16")(images)
    for one, other, exact in zip(again, half, full, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        torch.testing.assert_close(one[1], exact[1], rtol=1e-4, atol=1e-4)


def test_shard_that_changes_while_it_is_read_is_an_error(model, jpeg, write_tar, tmp_path, monkeypatch):
    shard, call = tmp_path / "in/a.tar", ModelEncoder.__call__
    write_tar(shard, {"x.jpg": jpeg(1, 40, 40)})

    def growing(self, images):
        write_tar(shard, {"x.jpg": jpeg(1, 40, 40), "y.jpg": jpeg(2, 400, 400)})
        return call(self, images)

    monkeypatch.setattr(ModelEncoder, "__call__", growing)
    with pytest.raises(ShardError, match="changed while"):
        encode(model, shard, tmp_path / "out", **OPTIONS)
    assert not read_json(tmp_path / "out/latentae.json").get("finished")


def test_two_workers_on_one_shard_do_no_harm(encoded, model, photos, snapshot, tmp_path, monkeypatch):
    """While one worker is at it, another does the whole job and cleans up."""
    call, out, inside = ModelEncoder.__call__, tmp_path / "out", []

    def interrupted(self, images):
        if not inside:
            inside.append(True)
            monkeypatch.setattr(os, "getpid", lambda: 1, raising=True)  # as another process would
            assert encode(model, photos, out, **OPTIONS)["finished"]
            monkeypatch.undo()
        return call(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(ModelEncoder, "__call__", interrupted)
        assert encode(model, photos, out, **OPTIONS)["finished"]
    assert snapshot(out) == snapshot(encoded)


@pytest.mark.parametrize("packed", [False, True])
def test_a_disk_that_is_full_is_one_clear_line_and_nothing_is_lost(
    packed, model, photos, snapshot, tmp_path, largest_file
):
    """No file may exceed a limit: the record, then the shards, then the statistics."""
    encode(model, photos, tmp_path / "whole", packed=packed, **OPTIONS)
    whole, out = snapshot(tmp_path / "whole"), tmp_path / "out"
    sizes = sorted({len(data) for data in whole.values()})
    for limit in (100, *(size - 1 for size in sizes if size > 1000)):
        with (
            largest_file(limit),
            pytest.raises(OutputError, match=r"could not write .*File too large") as caught,
        ):
            encode(model, photos, out, packed=packed, **OPTIONS)
        assert "\n" not in str(caught.value)
        assert not list(out.rglob("*.incomplete"))
    encode(model, photos, out, packed=packed, **OPTIONS)
    assert snapshot(out) == whole


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, RecipeError, "expected one of bf16, fp16, fp32"),
        ({"batch_size": 0}, RecipeError, "batch_size is 0"),
        ({"workers": -1}, RecipeError, "workers is -1"),
        ({"max_bad_share": 2}, RecipeError, "max_bad_share is 2"),
        ({"compute_dtype": "fp16"}, RecipeError, "expected one of auto, fp32, bf16"),
        ({"buckets": "some"}, RecipeError, "expected one of none, auto"),
        ({"buckets": "auto"}, DataError, "no buckets for resolution 32"),
        ({"engine": "steam"}, RecipeError, "expected one of local, ray"),
        ({"format": "tape"}, RecipeError, "expected one of latentae, "),
        ({"resolution": 34}, ImageError, "multiple of 4; use 32"),
        ({"task_id": 1}, RecipeError, "give both or neither"),
        ({"task_id": 3, "num_tasks": 3}, RecipeError, "expected 0 to 2"),
        ({"device": "abacus"}, RecipeError, "abacus"),
        ({"shards": "nothing"}, ShardError, "nothing"),
        ({"model": "nothing"}, ModelError, "nothing"),
    ],
)
def test_bad_options_make_no_output(options, error, message, model, photos, tmp_path):
    arguments = {"model": model, "shards": photos, **OPTIONS, **options}
    with pytest.raises(error, match=message):
        encode(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
