"""A class label is a whole number in any notation; others are refused when used."""

from __future__ import annotations

import json

import numpy as np
import pytest
from latent_writer import make_samples, write_output

from latentae.encoding.formats import write
from latentae.encoding.latent_dataset import LatentDataset
from latentae.encoding.latent_shard import has_label, label_of
from latentae.errors import DataError

WRITTEN = [
    ({"cls": b"3"}, 3),
    ({"cls": b" 3\n"}, 3),
    ({"cls": b"3.0"}, 3),
    ({"json": b'{"label": 3}'}, 3),
    ({"json": b'{"label": 3.0}'}, 3),
    ({"json": b'{"label": "3"}'}, 3),
    ({"json": b'{"label": true}'}, 1),
    ({"json": b'{"label": false}'}, 0),
    ({"json": b'\xef\xbb\xbf{"label": 3}'}, 3),
    ({"json": b'{"label": 5}', "cls": b"3"}, 3),
    ({"cls": b"9007199254740993"}, 9007199254740993),  # more than a float holds
    ({}, None),
    ({"cls": b""}, None),
    ({"cls": b"-1"}, None),
    ({"json": b'{"label": null}'}, None),
    ({"json": b'{"name": "cat"}'}, None),
    ({"json": b"[1]"}, None),
]
NO_CLASS = [
    ({"cls": b"cat"}, "the label 'cat'"),
    ({"cls": b"3.5"}, "the label '3.5'"),
    ({"cls": b"-7"}, "the label '-7'"),
    ({"cls": b"nan"}, "the label 'nan'"),
    ({"cls": str(1 << 63).encode()}, "the label"),
    ({"json": b'{"label": "tabby cat"}'}, "the label 'tabby cat'"),
    ({"json": b'{"label": [3]}'}, r"the label \[3\]"),
    ({"json": b'{"label": 1e400}'}, "the label inf"),
    ({"json": b"{"}, "a json that can't be read"),
    ({"json": json.dumps({"label": 3, "text": "x" * (1 << 20)}).encode()}, "a json that is too long"),
]


def output(folder, members):
    made = make_samples(3, labels=0)
    made[1].members |= members
    return write_output(folder, {"a.tar": made})


@pytest.mark.parametrize(("members", "label"), WRITTEN, ids=str)
def test_a_whole_number_is_a_label_however_it_is_written(members, label):
    assert label_of(members.get("cls"), members.get("json")) == label


def test_labels_of_a_data_set(tmp_path):
    made = make_samples(len(WRITTEN), labels=0)
    for one, (members, _) in zip(made, WRITTEN, strict=True):
        one.members |= members
    expected = [-1 if label is None else label for _, label in WRITTEN]
    dataset = LatentDataset(write_output(tmp_path / "out", {"a.tar": made}), sample=True)
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == expected == [item.label for item in dataset]


@pytest.mark.parametrize(("members", "found"), NO_CLASS, ids=lambda value: str(value)[:40])
def test_a_label_that_is_no_class_is_refused_where_it_is_asked_for(tmp_path, members, found):
    folder = output(tmp_path / "out", members)
    message = rf"sample 'photos/0001' of a\.tar has {found}.* whole numbers from 0.* labels=False"
    dataset = LatentDataset(folder, sample=True)
    with pytest.raises(DataError, match=message):
        _ = dataset.labels
    with pytest.raises(DataError, match=message):
        dataset[1]
    assert dataset[0].label == -1
    assert LatentDataset(folder)[1].key == "photos/0001"
    ignored = LatentDataset(folder, sample=True, labels=False)
    assert ignored.labels.tolist() == [-1, -1, -1]
    assert ignored[1].label == -1


def test_layouts_with_labels_refuse_words(tmp_path):
    folder = output(tmp_path / "latents", {"cls": b"cat"})
    with pytest.raises(DataError, match="the label 'cat'"):
        write("fastdit", folder, tmp_path / "out")


def test_encoding_for_a_layout_with_labels_refuses_words_before_the_work(write_tar, tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": b"", "x.cls": b"cat"})
    with pytest.raises(
        DataError, match=r"sample 'x' of .*a\.tar has the label 'cat', but classes are whole numbers"
    ):
        has_label([str(tmp_path / "a.tar")])
