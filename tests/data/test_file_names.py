from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentae.data.folder import check_file_names
from latentae.errors import OutputError
from latentae.files import atomic_file


def test_names_that_can_be_written_pass(tmp_path):
    check_file_names(
        tmp_path / "new" / "folder",
        [("a/b.png", "b"), ("a/c.png", "c"), ("été\udcff.png", "d"), ("x" * 255, "e")],
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/b.png", "c.png", "a/b.png"], r"sample 0 and sample 2 would both be written to 'a/b\.png'"),
        (["a/" + "é" * 128], "sample 0 needs a file name of 256 bytes, .* takes 255"),
        (["../x"], "can't be written as the file"),
        (["a//x"], "can't be written as the file"),
        (["a\0x"], "can't be written as the file"),
        (["x/" * 3000 + "y"], "needs a path of"),
    ],
)
def test_names_that_cannot_be_written_are_refused(names, message, tmp_path):
    with pytest.raises(OutputError, match=message):
        check_file_names(tmp_path, [(name, f"sample {number}") for number, name in enumerate(names)])


@pytest.mark.skipif(not hasattr(os, "pathconf"), reason="Windows")
def test_the_file_system_says_how_long_a_name_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pathconf", lambda path, name: {"PC_NAME_MAX": 143, "PC_PATH_MAX": 4096}[name])
    with pytest.raises(OutputError, match="takes 143"):
        check_file_names(tmp_path, [("x" * 144, "a")])


def test_a_name_that_just_fits_is_written(tmp_path):
    path = Path(tmp_path, "x" * 251 + ".png")
    with atomic_file(path) as temporary:
        temporary.write_text("here")
    assert path.read_text() == "here"
    assert list(tmp_path.iterdir()) == [path]
