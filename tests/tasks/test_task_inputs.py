from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from latentae.data.shards import shards
from latentae.errors import DataError, ImageError
from latentae.tasks.inputs import fit_image, open_images, read_labels


def _save(path, value, size=(8, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)
    return path


def _read(images, labels="auto", numbers=None, **options):
    numbers = range(images.count) if numbers is None else numbers
    options = {"channels": 3, "resolution": None, **options}
    return list(images.items(numbers, read_labels(labels)[0], **options))


@pytest.fixture
def folder(tmp_path):
    for number in range(7):
        _save(tmp_path / "photos" / ("good" if number < 4 else "bad") / f"{number}.png", number * 10)
        (tmp_path / "photos" / ("good" if number < 4 else "bad") / f"{number}.cls").write_text(
            f"{number % 2}\n"
        )
    return tmp_path / "photos"


def test_shards_and_the_folder_they_are_of_give_the_same_images(folder, tmp_path):
    shards(folder, tmp_path / "shards", shard_size=3)
    loose, packed = _read(open_images(folder)), _read(open_images(tmp_path / "shards"))
    assert [(item.number, item.key, item.label) for item in loose] == [
        (item.number, item.key, item.label) for item in packed
    ]
    assert all((a.image == b.image).all() for a, b in zip(loose, packed, strict=True))
    assert [item.key for item in _read(open_images(str(tmp_path / "shards")), numbers=[1, 4, 6])] == [
        loose[i].key for i in (1, 4, 6)
    ]


def test_labels_come_from_class_files_from_folders_or_from_a_table(folder, tmp_path):
    images = open_images(folder)
    assert [item.label for item in _read(images)] == [
        "0",
        "1",
        "0",
        "0",
        "1",
        "0",
        "1",
    ]  # bad/4 5 6, good/0 1 2 3
    assert [item.label for item in _read(images, "folder")] == ["bad"] * 3 + ["good"] * 4
    assert {item.label for item in _read(images, "none")} == {None}
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "label"], ["good/1", "cat"]])
    assert [item.label for item in _read(images, tmp_path / "labels.csv")] == [None] * 4 + ["cat", None, None]


def test_only_wanted_images_are_decoded(folder):
    (folder / "bad" / "4.png").write_bytes(b"not an image")
    images = open_images(folder)
    assert len(_read(images, wanted=lambda key: key.startswith("good"))) == 4
    with pytest.raises(ImageError, match=r"4\.png"):
        _read(images)


def test_named_files_keep_their_order(folder):
    files = [folder / "good" / "2.png", folder / "bad" / "5.png"]
    images = open_images(files)
    assert [item.key for item in _read(images)] == ["2", "5"]
    assert [item.label for item in _read(images)] == ["0", "1"]
    assert open_images(files[::-1]).digest != images.digest


def test_images_keep_their_shape_or_become_squares(folder):
    images = open_images(folder)
    assert _read(images)[0].image.shape == (3, 8, 12)
    assert _read(images, resolution=4, channels=1)[0].image.shape == (1, 4, 4)
    wide = _save(folder.parent / "wide.png", 9, (100, 2048))
    assert fit_image(_read(open_images(wide))[0].image, None).shape == (3, 50, 1024)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no inputs given"),
        (["nowhere.png"], "no image file nowhere.png"),
        ("nowhere", "nowhere"),
        (["a/1.png", "b/1.png"], "1.png"),
    ],
)
def test_what_is_no_image_is_refused(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "a" / "1.png", 1)
    _save(tmp_path / "b" / "1.png", 1)
    with pytest.raises(DataError, match=words):
        open_images(given)


def test_a_table_without_the_columns_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("name,class\na,b\n")
    with pytest.raises(DataError, match="key and label"):
        read_labels(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="can't be read"):
        read_labels("cls")
