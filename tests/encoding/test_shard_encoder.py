from __future__ import annotations

import io
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save

import latentae.encoding.encode as encode_module
from latentae import AutoencoderKL, AutoencoderKLConfig, encode
from latentae.data.decode import decode_image
from latentae.data.order import assign_buckets, default_buckets
from latentae.data.transforms import crop_to_bucket, resize_and_center_crop
from latentae.encoding import image_batches
from latentae.encoding.image_batches import geometry
from latentae.encoding.options import EncodeOptions
from latentae.encoding.plan import Shard, ShardSettings
from latentae.encoding.shard_encoder import ModelEncoder, PatientEncoder, encode_shards
from latentae.encoding.store import LocalStore, open_store
from latentae.encoding.threads import Crew, default_workers
from latentae.errors import DataError, ModelError, RecipeError, ShardError
from latentae.files import read_json, sha256

OPTIONS = {"dtype": "fp32", "batch_size": 4, "device": "cpu"}


def settings(buckets=((32, 32),), workers=0, **options):
    table = EncodeOptions("model", "shards", "out", **{**OPTIONS, **options})
    return ShardSettings(table, "f" * 64, buckets, 3, 3, workers=workers)


def encode_photos(shard, out, encoder, settings):
    """One shard, as a.tar."""
    return list(encode_shards([Shard(str(shard), "a.tar")], open_store(out), encoder, settings))


def small_encoder(images):
    """A posterior that is a function of each image alone: its means over blocks of 4 pixels."""
    mean = images.float().unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    return mean, mean / 255 - 1


def threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("latentae"))


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert threads() == []


@pytest.fixture
def wide(jpeg, write_tar, tmp_path):
    """One shard of 24 images of several shapes, one of them unreadable."""
    members = {}
    for number in range(24):
        members[f"{number:03}.jpg"] = jpeg(
            number, *[(96, 96), (60, 130), (140, 70), (96, 100)][number * number % 7 % 4]
        )
        members[f"{number:03}.txt"] = f"caption {number}".encode()
    members["017.jpg"] = members["017.jpg"][:200]
    write_tar(tmp_path / "wide/a.tar", members)
    return tmp_path / "wide"


@pytest.mark.parametrize(
    ("workers", "options"),
    [(1, {}), (4, {"buckets": "auto", "resolution": 192, "packed": True, "flip": True})],
)
def test_bytes_do_not_depend_on_the_number_of_workers(
    workers, options, model, photos, wide, snapshot, tmp_path
):
    shards = [*sorted(photos.glob("*.tar")), wide / "a.tar"]
    for count in (0, workers):
        encode(model, shards, tmp_path / f"{count}", workers=count, max_bad_share=0.1, **OPTIONS, **options)
    assert snapshot(tmp_path / "0") == snapshot(tmp_path / f"{workers}")


def test_buckets_flips_and_order(model, wide, read_tar, tmp_path):
    """Each image at its own bucket, its mirror image too, all in the order of the input."""
    summary = encode(
        model, wide, tmp_path / "out", buckets="auto", resolution=192, flip=True, max_bad_share=0.1, **OPTIONS
    )
    images, found = read_tar(wide / "a.tar"), read_tar(tmp_path / "out/a.tar")
    keys = [f"{number:03}" for number in range(24) if number != 17]
    assert list(found) == [
        f"{key}.{part}" for key in keys for part in ("latent.safetensors", "latent.json", "txt")
    ]
    encoder = ModelEncoder(AutoencoderKL.from_pretrained(model), torch.device("cpu"))
    sizes = default_buckets(192)
    used = set()
    for key in keys:
        image = decode_image(images[f"{key}.jpg"], key)
        info = json.loads(found[f"{key}.latent.json"])
        bucket = sizes[int(assign_buckets(image.shape[1], image.shape[2], sizes))]
        assert info["bucket"] == info["crop"][2:] == list(bucket)
        used.add(bucket)
        latents = load_safetensors(found[f"{key}.latent.safetensors"])
        crop = crop_to_bucket(image, bucket)[None]
        expected = dict(zip(("mean", "logvar"), encoder(crop), strict=True))
        expected |= dict(zip(("mean_flip", "logvar_flip"), encoder(crop.flip(3)), strict=True))
        assert latents.keys() == expected.keys()
        for name, value in expected.items():
            # fp32 sums depend on the batch and the number of threads
            torch.testing.assert_close(latents[name], value[0], rtol=1e-4, atol=1e-4)
    assert len(used) >= 3
    assert summary["samples"] == 23
    record = read_json(tmp_path / "out/a.tar.done.json")
    assert record["flip"] is True
    assert record["skipped"] == {"unreadable image": ["017"]}


def test_packed_latents_are_the_same_and_lie_where_the_tar_says(model, wide, read_tar, tmp_path):
    options = {
        "buckets": "auto",
        "resolution": 192,
        "flip": True,
        "max_bad_share": 0.1,
        **OPTIONS,
        "dtype": "bf16",
    }
    encode(model, wide, tmp_path / "plain", **options)
    encode(model, wide, tmp_path / "packed", packed=True, **options)
    plain, packed = (read_tar(tmp_path / name / "a.tar") for name in ("plain", "packed"))
    record = read_json(tmp_path / "packed/a.tar.done.json")
    assert record["statistics"] == read_json(tmp_path / "plain/a.tar.done.json")["statistics"]
    stacks = {}
    for file in record["packed"]:
        path = tmp_path / "packed" / file["name"]
        assert (path.stat().st_size, sha256(path)) == (file["bytes"], file["sha256"])
        stacks[file["name"]] = load_file(path)
        assert len(stacks[file["name"]]["mean"]) == file["rows"]
        again = save(stacks[file["name"]])
        assert len(again) == file["bytes"], "the layout is safetensors' own"
    assert len(stacks) >= 3
    assert [name for name in packed if name.endswith("safetensors")] == []
    for name, data in plain.items():
        if name.endswith(".latent.safetensors"):
            info = json.loads(packed[name.replace("safetensors", "json")])
            high, wide_ = info["bucket"]
            row = {k: v[info["row"]] for k, v in stacks[f"a.latents-{high}x{wide_}.safetensors"].items()}
            one = load_safetensors(data)
            assert row.keys() == one.keys()
            assert all(torch.equal(row[key], one[key]) for key in one)
        elif name.endswith(".txt"):
            assert packed[name] == data


def test_few_samples_wait_for_their_bucket(jpeg, write_tar, tmp_path):
    """A rare shape does not hold back all that follow it."""
    members = [(60, 130)] + [(64, 64)] * 4 * (image_batches.SPAN + 4)
    write_tar(
        tmp_path / "a.tar", {f"{number:03}.jpg": jpeg(number, *shape) for number, shape in enumerate(members)}
    )
    sizes = []

    def encoder(images):
        sizes.append(tuple(images.shape[2:]))
        return small_encoder(images)

    encode_photos(tmp_path / "a.tar", tmp_path / "out", encoder, settings(default_buckets(192)))
    assert [size != (192, 192) for size in sizes].index(True) == image_batches.SPAN


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_models_of_any_channels_take_images_of_any_kind(channels, write_tar, tmp_path):
    config = AutoencoderKLConfig(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        mid_block_add_attention=False,
        sample_size=32,
    )
    AutoencoderKL(config).save_pretrained(tmp_path / "model")
    members = {}
    for number, mode in enumerate(("L", "RGBA", "P", "I;16", "RGB")):
        buffer = io.BytesIO()
        Image.new(mode, (40, 33)).save(buffer, "PNG")
        members[f"{number}.png"] = buffer.getvalue()
    write_tar(tmp_path / "in/a.tar", members)
    assert encode(tmp_path / "model", tmp_path / "in", tmp_path / "out", **OPTIONS)["samples"] == 5


def test_shards_and_output_may_be_remote(model, photos, encoded, snapshot, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for shard in photos.glob("*.tar"):
        memory.pipe_file(f"/encode-in/{shard.name}", shard.read_bytes())
    try:
        summary = encode(model, "memory://encode-in/*.tar", "memory://encode-out/latents", **OPTIONS)
        assert (summary["finished"], summary["samples"]) == (True, 12)
        found = {
            path.removeprefix("/encode-out/latents/"): memory.cat_file(path)
            for path in memory.find("/encode-out")
        }
    finally:
        for folder in ("/encode-in", "/encode-out"):
            memory.rm(folder, recursive=True)
    expected = snapshot(encoded)
    assert found.keys() == expected.keys()
    assert all(
        found[name] == expected[name]
        for name in expected
        if name.endswith((".tar", ".done.json", "statistics.json"))
    )


def hungry(limit):
    def encoder(images):
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return small_encoder(images)

    return encoder


def test_out_of_memory_halves_the_batch_for_good_and_is_recorded(photos, snapshot, tmp_path, capsys):
    shards = [Shard(str(photos / name), name) for name in ("train-000.tar", "train-003.tar")]
    one, other = open_store(tmp_path / "one"), open_store(tmp_path / "other")
    found = list(encode_shards(shards, one, hungry(1), settings()))
    plain = list(encode_shards(shards, other, small_encoder, settings()))
    assert [sidecar.batch_sizes for sidecar in found] == [[1], [1]]
    assert [sidecar.batch_sizes for sidecar in plain] == [[], []]
    assert [s.output for s in found] == [s.output for s in plain], "this encoder has no last bits to lose"
    said = capsys.readouterr().err
    assert said.count("reduced to 2 images of 32x32") == said.count("reduced to 1 images of 32x32") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_out_of_memory_with_one_image_is_an_error(workers, photos, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"single image of 32x32 pixels.*CUDA out of memory"):
        encode_photos(photos / "train-000.tar", tmp_path / "out", hungry(0), settings(workers=workers))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    monkeypatch.setattr(LocalStore, "write", None)
    with pytest.raises(TypeError):  # a writer that fails ends the job too
        encode_photos(photos / "train-003.tar", tmp_path / "out", small_encoder, settings(workers=workers))


def test_out_of_memory_of_the_cpu_and_other_errors():
    def greedy(images):
        return torch.empty(len(images) // 2 * 2**55, dtype=torch.uint8), images

    patient = PatientEncoder(lambda images: greedy(images) if len(images) > 1 else small_encoder(images), 5)
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, _ = patient(images)
    assert patient.size == 1
    torch.testing.assert_close(mean, small_encoder(images)[0])

    def broken(images):
        raise RuntimeError("a shape does not fit")

    with pytest.raises(RuntimeError, match="a shape does not fit"):
        PatientEncoder(broken, 4)(images[:4])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_reader_comes_after_the_shards_before_it(workers, photos, write_tar, tmp_path):
    (tmp_path / "bad.tar").write_bytes((photos / "train-003.tar").read_bytes()[:-20_000])
    sources = (photos / "train-000.tar", tmp_path / "bad.tar", photos / "train-001.tar")
    shards = [Shard(str(path), name) for path, name in zip(sources, ("a.tar", "b.tar", "c.tar"), strict=True)]
    found = []
    with pytest.raises(ShardError, match=r"bad\.tar"):
        found.extend(
            sidecar.shard
            for sidecar in encode_shards(
                shards, open_store(tmp_path / "out"), small_encoder, settings(workers=workers)
            )
        )
    assert found == ["a.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.tar", "a.tar.done.json"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to oneself")
def test_ctrl_c_ends_all_threads_and_leaves_nothing_half_written(photos, tmp_path):
    calls = []

    def interrupted(images):
        calls.append(threading.current_thread())
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        return small_encoder(images)

    shards = [Shard(str(photos / name), name) for name in ("train-000.tar", "train-003.tar")]
    began = time.monotonic()
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job begins with Ctrl-C ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            list(
                encode_shards(
                    shards, open_store(tmp_path / "out"), interrupted, settings(workers=2, batch_size=2)
                )
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20, "the encoder is not waited for"
    assert set(calls) == {threading.main_thread()}
    assert list((tmp_path / "out").iterdir()) == []


def test_what_waits_is_bounded(photos, tmp_path):
    """A slow encoder: reading, decoding and writing wait for it."""
    shard = photos / "train-003.tar"
    begun = []

    def work():
        for number in range(20):
            begun.append(number)
            yield Shard(str(shard), f"{number}.tar")

    ahead = []

    def slow(images):
        time.sleep(0.02)
        ahead.append(begun[-1] - len(ahead) // 3)  # shards of 6 samples in batches of 2
        return small_encoder(images)

    some = settings(workers=4, batch_size=2)
    assert len(list(encode_shards(work(), open_store(tmp_path / "out"), slow, some))) == 20
    assert max(ahead) <= 5
    assert max(ahead) >= 1, "and the next shard is read while this one is encoded"
    assert list(encode_shards([], open_store(tmp_path / "none"), small_encoder, some)) == []
    for _ in encode_shards(work(), open_store(tmp_path / "left"), small_encoder, some):
        break
    assert list((tmp_path / "left").glob(".*")) == [], "a consumer that leaves ends the work"


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_stages_keep_the_order_and_hand_on_errors(workers):
    def consume(items):
        for item in items:
            yield item + 1

    def broken():
        yield from range(7)
        raise ValueError("the seventh")

    with Crew(workers) as crew:
        doubled = crew.map(lambda x: 2 * x, iter(range(50)), 5)
        assert list(crew.behind(consume, crew.ahead(doubled, 2), 2)) == [
            2 * number + 1 for number in range(50)
        ]
    found = []
    with Crew(workers) as crew, pytest.raises(ValueError, match="the seventh"):
        found.extend(crew.behind(consume, crew.ahead(broken(), 2), 2))
    assert found == list(range(1, 8))


def test_workers_leave_the_encoder_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Crew(3) as crew:
            counts = list(crew.map(lambda _: torch.get_num_threads(), iter(range(9)), 9))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(counts) == {1}
    assert default_workers(torch.device("cpu")) == 1
    assert 1 <= default_workers(torch.device("cuda")) <= 16


@pytest.mark.parametrize("shape", [(64, 64), (48, 100), (101, 51), (90, 1000), (1000, 90)])
@pytest.mark.parametrize("bucket", [(32, 32), (64, 32), (32, 64)])
def test_geometry_is_what_was_cropped(shape, bucket):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)).permute(
        2, 0, 1
    )
    info = geometry(*shape, bucket)
    top, left, high, wide_ = info["crop"]
    assert (high, wide_) == tuple(info["bucket"]) == bucket
    assert info["original_size"] == list(shape)
    assert 0 <= top <= info["resized_size"][0] - high
    assert 0 <= left <= info["resized_size"][1] - wide_
    if bucket == (32, 32) and max(shape) < 4 * min(shape):
        resized = torch.nn.functional.interpolate(
            image[None].contiguous(memory_format=torch.channels_last),
            tuple(info["resized_size"]),
            mode="bicubic",
            antialias=True,
        )[0]
        assert torch.equal(
            resized[:, top : top + high, left : left + wide_], resize_and_center_crop(image, 32)
        )


def test_two_tasks_given_the_same_shards_share_them(encoded, model, photos, snapshot, tmp_path, monkeypatch):
    """What another has done since the start is not done again."""
    prepare, call, calls = encode_module.prepare, ModelEncoder.__call__, []

    def overtaken(*arguments, **options):
        work = prepare(*arguments, **options)
        monkeypatch.setattr(encode_module, "prepare", prepare)
        assert encode(model, photos, tmp_path / "out", **OPTIONS)["finished"]
        return work

    monkeypatch.setattr(ModelEncoder, "__call__", lambda self, images: calls.append(1) or call(self, images))
    monkeypatch.setattr(encode_module, "prepare", overtaken)
    assert encode(model, photos, tmp_path / "out", **OPTIONS)["finished"]
    assert len(calls) == 5, "batches of 4 of shards of 5, 1, 0 and 6"
    assert snapshot(tmp_path / "out") == snapshot(encoded)


def test_another_trainers_layout_is_written_from_latents_that_have_what_it_needs(
    model, jpeg, write_tar, tmp_path, capsys
):
    members = {}
    for number in range(3):
        members |= {f"{number}.jpg": jpeg(number, 40, 40), f"{number}.cls": b"0"}
    write_tar(tmp_path / "in/a.tar", members)
    for format, kind in (("mar", "npz"), ("repa", "png")):  # the one needs flips, the other images
        out = tmp_path / format
        summary = encode(model, tmp_path / "in", out, format=format, **OPTIONS)
        assert summary["out"] == str(out / format)
        assert len(list((out / format).rglob(f"*.{kind}"))) == 3
        assert read_json(out / "latents/a.tar.done.json")["flip"] is (format == "mar")
        encode(model, tmp_path / "in", out, format=format, **OPTIONS)
        assert capsys.readouterr().err.count("already finished") == 2
    with pytest.raises(RecipeError, match="one size"):
        encode(model, tmp_path / "in", tmp_path / "other", format="mar", buckets="auto", **OPTIONS)
    write_tar(tmp_path / "unlabelled/a.tar", {"0.jpg": jpeg(0, 40, 40), "0.json": b'{"label": "cat"}'})
    with pytest.raises(DataError, match="has the label 'cat'"):
        encode(model, tmp_path / "unlabelled", tmp_path / "other", format="mar", **OPTIONS)
    assert not (tmp_path / "other").exists()
