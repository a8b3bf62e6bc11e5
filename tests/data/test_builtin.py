from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from latentae.data.builtin import BUILTIN, HELD_OUT, TRAINING, BuiltinImages, digits, is_builtin
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
