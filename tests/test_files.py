from __future__ import annotations

import os
import subprocess
import sys

import pytest

from latentae.errors import OutputError
from latentae.files import abandoned, atomic_file, read_json, sha256, staged_folder, write_json


def test_a_file_is_whole_or_not_there(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with pytest.raises(RuntimeError, match="middle"), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("middle")
    assert list((tmp_path / "new").iterdir()) == []
    with atomic_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_keeps_the_old_file_and_is_one_clear_line(tmp_path):
    target = tmp_path / "file.json"
    write_json(target, {"a": 1})

    def full(path):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(OutputError, match=r"could not write .*file\.json: No space left on device"),
        atomic_file(target),
    ):
        full(target)
    assert read_json(target) == {"a": 1}


def test_a_parent_that_is_a_file_is_said(tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(OutputError, match="could not write"):
        write_json(tmp_path / "plain" / "x.json", {})


def test_not_a_number_never_reaches_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"psnr": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "export"
    with pytest.raises(RuntimeError), staged_folder(target) as staging:
        (staging / "a").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    target.mkdir()  # an empty folder is no obstacle
    with staged_folder(target) as staging:
        (staging / "a").write_text("a")
    assert [p.name for p in target.iterdir()] == ["a"]
    with pytest.raises(OutputError, match="not an empty folder"), staged_folder(target):
        pass
    assert (target / "a").read_text() == "a"


def test_sha256_is_the_standard_digest(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_a_living_process_writes_is_not_abandoned(tmp_path):
    with atomic_file(tmp_path / "file.tar") as temporary:
        temporary.write_text("on its way")
        assert not abandoned(temporary)
        os.utime(temporary, (0, 0))
        assert abandoned(temporary), "nobody has written to it for ages"
    assert not abandoned(temporary), "it has its name now"
    ends = "import os, sys; from latentae.files import atomic_file; "
    ends += "atomic_file(sys.argv[1]).__enter__().touch(); os._exit(1)"
    subprocess.run([sys.executable, "-c", ends, str(tmp_path / "other.tar")])
    (leftover,) = tmp_path.glob("*.incomplete")
    assert abandoned(leftover)
    assert not abandoned(leftover.rename(tmp_path / ".other.tar.elsewhere.1.incomplete")), (
        "nobody here can know"
    )
