"""Disks that can't do all that a local one can: what fails is named with what to do, what does not
matter is passed over.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from latentae.errors import OutputError
from latentae.files import staged_folder, write_text


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_can_not_flush_is_written_to(tmp_path, monkeypatch, number):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file", "text")
    with staged_folder(tmp_path / "folder") as staging:
        (staging / "inner").write_text("text")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inner").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_folder_that_can_not_be_opened_is_written_to(tmp_path, monkeypatch, number):
    real = os.open

    def opened(path, flags, *rest, **options):
        if Path(path).is_dir() and flags == os.O_RDONLY:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", opened)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free the space"),
        (errno.EDQUOT, "free the space"),
        (errno.EFBIG, "free the space"),
        (errno.EROFS, "that you can write to"),
        (errno.EACCES, "that you can write to"),
        (errno.EIO, "choose another folder"),
    ],
)
def test_advice_fits_what_failed(tmp_path, monkeypatch, number, advice):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match=f"{os.strerror(number)}; .*{advice}"):
        write_text(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_asks_for_a_shorter_one(tmp_path):
    with pytest.raises(OutputError, match="File name too long; choose a shorter name"):
        write_text(tmp_path / ("x" * 300), "text")


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
