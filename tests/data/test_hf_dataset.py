from __future__ import annotations

import datetime
import importlib
import json
import sys
from typing import Any

import pytest

from latentae.data.hf_dataset import is_dataset
from latentae.data.shard_files import expand_shards, read_shard
from latentae.data.shards import shards
from latentae.errors import DataError, ImageError, MissingDependencyError


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    module = pytest.importorskip("datasets", minversion="4")
    module.disable_progress_bars()
    config: Any = importlib.import_module("datasets.config")
    config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf")
    return module


def samples(folder) -> list[dict]:
    return [sample for path in expand_shards(folder) for sample in read_shard(path)]


@pytest.fixture
def rows(make_png):
    return {
        "image": [{"bytes": make_png(number), "path": None} for number in range(5)],
        "label": [0, 1, -1, None, 1],
        "text": [f"nummer {number} é" for number in range(5)],
        "score": [0.5, float("nan"), 2.0, None, 1.0],
        "day": [datetime.datetime(2020, 1, 1 + number) for number in range(5)],
        "boxes": [[1, 2]] * 5,
    }


@pytest.fixture
def dataset(datasets, rows):
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["cat", "dog"]),
        text=datasets.Value("string"),
        score=datasets.Value("float64"),
        day=datasets.Value("timestamp[s]"),
        boxes=datasets.List(datasets.Value("int64")),
    )
    return datasets.Dataset.from_dict(rows, features=features)


def test_images_labels_and_columns_of_a_saved_dataset(dataset, rows, tmp_path, capsys):
    dataset.save_to_disk(tmp_path / "saved")
    assert is_dataset(tmp_path / "saved")
    index = shards(tmp_path / "saved", tmp_path / "out", shard_size=2)
    assert [shard.samples for shard in index.shards] == [2, 2, 1]
    assert "boxes" in capsys.readouterr().err
    found = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in found] == [f"{number:09}" for number in range(5)]
    assert [sample["png"] for sample in found] == [image["bytes"] for image in rows["image"]]
    assert [sample.get("cls") for sample in found] == [b"0", b"1", None, None, b"1"]
    assert json.loads(found[0]["json"]) == {
        "text": "nummer 0 é",
        "score": 0.5,
        "day": "2020-01-01 00:00:00",
        "label": "cat",
    }
    assert json.loads(found[1]["json"])["score"] is None
    assert shards(tmp_path / "saved", tmp_path / "out", shard_size=2) == index
    dataset.select([4, 1]).save_to_disk(tmp_path / "chosen")  # rows keep their order
    shards(tmp_path / "chosen", tmp_path / "few", max_shard_mb=1e-6)
    assert [sample["png"] for sample in samples(tmp_path / "few")] == [
        rows["image"][number]["bytes"] for number in (4, 1)
    ]


def test_a_row_without_an_image_is_bad(datasets, tmp_path, make_png):
    features = datasets.Features(picture=datasets.Image())
    images = [{"bytes": make_png(), "path": None}, None, {"bytes": b"<html>", "path": None}]
    datasets.Dataset.from_dict({"picture": images}, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ImageError, match="row 1"):
        shards(tmp_path / "saved", tmp_path / "stopped", workers=1)
    assert shards(tmp_path / "saved", tmp_path / "out", skip_bad=True).samples == 1
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in bad] == ["000000001", "000000002"]


def test_several_splits_are_named(datasets, dataset, tmp_path):
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"splits train, test; name one, such as .*saved/train"):
        shards(tmp_path / "saved", tmp_path / "out")
    assert shards(tmp_path / "saved" / "test", tmp_path / "out").samples == 1


def test_a_dataset_by_name(datasets, tmp_path, make_png):
    for split, count in (("train", 3), ("test", 2)):
        for number in range(count):
            path = tmp_path / "named" / split / ("cat" if number % 2 else "dog") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_png(number))
    with pytest.raises(DataError, match=r"has the splits train, test; name one"):
        shards(f"hf://{tmp_path}/named", tmp_path / "out")
    shards(f"hf://{tmp_path}/named:train", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in found] == [f"train/{number:09}" for number in range(3)]
    assert sorted(sample["png"] for sample in found) == sorted(make_png(number) for number in range(3))
    assert {sample["cls"] for sample in found} == {b"0", b"1"}
    assert (tmp_path / "out" / "000000.tar").is_file()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "string"}, "no image column, found text"),
        ({"left": None, "right": None}, "image columns left, right"),
    ],
)
def test_a_dataset_without_one_image_column_is_refused(datasets, tmp_path, make_png, columns, message):
    features = datasets.Features(
        {name: datasets.Value(kind) if kind else datasets.Image() for name, kind in columns.items()}
    )
    values = {
        name: ["x"] if kind else [{"bytes": make_png(), "path": None}] for name, kind in columns.items()
    }
    datasets.Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=message):
        shards(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_is_not_there_is_one_line(datasets, tmp_path):
    with pytest.raises(DataError, match=r"can't be loaded") as caught:
        shards(f"hf://{tmp_path}/nowhere:train", tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="names no dataset"):
        shards("hf://", tmp_path / "out")


def test_without_the_library_its_name_is_said_and_a_folder_of_images_is_no_dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        shards("hf://someone/something", tmp_path / "out")
    assert not is_dataset(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert not is_dataset(tmp_path)
