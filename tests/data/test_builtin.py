from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.data.builtin import (
    BUILTIN,
    HELD_OUT,
    TRAINING,
    BuiltinImages,
    digits,
    is_builtin,
    photo_file,
    photo_tiles,
    write_photo_tiles,
)
from latentae.data.decode import decode_image
from latentae.data.shard_files import expand_shards, read_shard
from latentae.data.shards import shards
from latentae.errors import DataError, MissingDependencyError


def test_digits_become_shards_with_their_classes_and_the_same_bytes_again(tmp_path):
    from sklearn.datasets import load_digits

    index = shards("sklearn:digits:held-out", tmp_path / "a")
    samples = [sample for path in expand_shards(tmp_path / "a") for sample in read_shard(path)]
    ink, classes = load_digits(return_X_y=True)
    assert index.samples == len(samples) == 360
    for number in (0, 7, 359):
        assert samples[number]["__key__"] == f"held-out/{number:09}"
        assert int(samples[number]["cls"]) == classes[1437 + number]
        pixels = decode_image(samples[number]["png"], "digit", channels=1).numpy().reshape(-1)
        assert np.array_equal(np.round(pixels / 255 * 16), ink[1437 + number]), "all 17 levels survive"
    assert shards("sklearn:digits:held-out", tmp_path / "a") == index, "the same job"
    shards("sklearn:digits:held-out", tmp_path / "b")
    assert (tmp_path / "a" / "000000.tar").read_bytes() == (tmp_path / "b" / "000000.tar").read_bytes()


def test_the_splits_of_digits_share_no_image_and_are_all_of_them():
    (train, _), (held_out, _) = digits("train"), digits("held-out")
    assert len(train) + len(held_out) == 1797
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in held_out}
    source = BuiltinImages("sklearn:digits")
    assert len(source.sizes) == len(train)
    assert source.key(3) == "train/000000003"


def test_binary_digits_are_black_and_white_and_the_same_digits():
    (gray, classes), (binary, same) = digits("train"), digits("train", binary=True)
    assert torch.equal(classes, same)
    assert set(binary.unique().tolist()) == {0, 255}
    assert torch.equal(binary == 255, gray >= 127), "half of 16 levels is 127.5, rounded to 128"


@pytest.mark.parametrize(("split", "names"), [("train", TRAINING), ("held-out", HELD_OUT)])
def test_photos_are_split_by_photo(split, names):
    source = BuiltinImages(f"skimage:photos:{split}")
    assert {source.key(number).split("/")[1] for number in range(len(source.sizes))} == {
        name.partition(".")[0] for name in names
    }
    image = decode_image(source.load(0)["png"], "tile")
    assert image.shape == (3, 128, 128)
    assert "cls" not in source.load(0)


def test_what_is_not_there_is_refused_with_what_is(tmp_path, monkeypatch):
    for spec in ("sklearn:faces", "skimage:digits", "sklearn:digits:test", "sklearn:"):
        with pytest.raises(
            DataError, match="no built-in set; expected sklearn:digits, sklearn:binary-digits"
        ) as caught:
            shards(spec, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    assert all(is_builtin(name) for name in BUILTIN)
    assert not any(is_builtin(name) for name in ("digits", "hf://sklearn:digits", "./sklearn:digits", ""))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"latentae\[quickstart\]"):
        BuiltinImages("sklearn:digits")


def test_held_out_photos_are_other_photos():
    assert not set(HELD_OUT) & set(TRAINING)
    images = {
        name: decode_image(photo_file(name).read_bytes(), name).float() for name in (*HELD_OUT, *TRAINING)
    }
    for name in HELD_OUT:
        assert images[name].shape[0] == 3
        assert (images[name][0] - images[name][1]).abs().mean() > 1, "held-out photos are in color"


def test_tiles_are_cut_from_the_photo_and_cover_it(tmp_path):
    count = write_photo_tiles(tmp_path, ("chelsea.png",), 128, 128)
    files = sorted((tmp_path / "chelsea").iterdir())
    assert len(files) == count == 4 * 3
    with Image.open(photo_file("chelsea.png")) as photo:
        whole = np.asarray(photo)
    covered = np.zeros(whole.shape[:2], bool)
    for file in files:
        top, left = map(int, file.stem.split("-"))
        with Image.open(file) as tile:
            assert np.array_equal(np.asarray(tile), whole[top : top + 128, left : left + 128])
        covered[top : top + 128, left : left + 128] = True
    assert covered.all()


@pytest.mark.parametrize(("size", "stride"), [(300, 128), (128, 128), (100, 50), (299, 1)])
def test_tiles_start_inside_and_the_last_ends_flush(size, stride):
    keys = [key.removeprefix("chelsea/").split("-") for key, _ in photo_tiles(("chelsea.png",), size, stride)]
    for axis, length in enumerate((300, 451)):
        starts = sorted({int(key[axis]) for key in keys})
        assert (starts[0], starts[-1] + size) == (0, length)
        assert all(after - before <= stride for before, after in pairwise(starts))
    assert len({tuple(key) for key in keys}) == len(keys)
