from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from image_files import noise, saved

from latentae.data import shards as shards_module
from latentae.data.decode import decode_image, decode_sample
from latentae.data.shard_files import expand_shards, read_shard
from latentae.data.shard_index import load_index
from latentae.data.shards import default_shard_size, shards, write_shards
from latentae.data.shrinking import encode_png
from latentae.errors import DataError, ImageError, OutputError, RecipeError, ShardError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(folder: Path) -> list[dict]:
    return [sample for path in expand_shards(folder) for sample in read_shard(path)]


@pytest.fixture
def images(tmp_path, make_png) -> Path:
    for number in range(7):
        path = tmp_path / "images" / ("a" if number < 4 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_png(number))
    return tmp_path / "images"


def test_images_come_back_byte_for_byte_and_are_indexed_as_they_are_written(images, tmp_path):
    (images / "a" / "rocket.JPG").write_bytes(saved(noise(12, 16, 3), "JPEG"))
    (images / "README.md").write_text("not an image", encoding="utf-8")
    index = shards(images, tmp_path / "out", shard_size=3)
    assert [shard.samples for shard in index.shards] == [3, 3, 2]
    assert index == load_index(expand_shards(tmp_path / "out"), build=False)
    assert all(len(entry.sha256) == 64 for entry in index.shards)
    assert index.table(1).keys() == ["a/3", "a/rocket", "b/4"]
    found = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in found] == [
        *(f"a/{n}" for n in range(4)),
        "a/rocket",
        *(f"b/{n}" for n in (4, 5, 6)),
    ]
    assert found[0]["png"] == (images / "a" / "0.png").read_bytes()
    assert found[4]["jpg"] == (images / "a" / "rocket.JPG").read_bytes()
    assert all(decode_sample(sample).image.shape == (3, 12, 16) for sample in found)


def test_the_same_images_give_the_same_bytes(images, tmp_path):
    for out in ("one", "two"):
        shards(images, tmp_path / out, shard_size=3, workers=1 if out == "one" else 4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "000000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in tar} == {
            (0, 0, 0, "", "", 0o644)
        }


def test_a_shard_is_cut_by_size_too(images, tmp_path):
    size = max(path.stat().st_size for path in images.rglob("*.png"))
    assert [
        shard.samples for shard in shards(images, tmp_path / "size", max_shard_mb=2.5 * size / 1e6).shards
    ] == [2, 2, 2, 1]
    assert [shard.samples for shard in shards(images, tmp_path / "tiny", max_shard_mb=1e-6).shards] == [1] * 7


def test_a_finished_folder_says_so_and_stays_and_a_shard_missing_from_it_is_not_passed_over(
    images, tmp_path, capsys
):
    first = shards(images, tmp_path / "out", shard_size=3)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert shards(images, tmp_path / "out", shard_size=3) == first
    assert "finished" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "000001.tar").unlink()
    with pytest.raises(ShardError, match=r"000001\.tar"):
        shards(images, tmp_path / "out", shard_size=3)


def test_other_images_or_settings_are_refused(images, tmp_path, make_png):
    shards(images, tmp_path / "out")
    with pytest.raises(OutputError, match="shard_size"):
        shards(images, tmp_path / "out", shard_size=2)
    (images / "new.png").write_bytes(make_png(99))
    with pytest.raises(OutputError, match="files"):
        shards(images, tmp_path / "out")
    with pytest.raises(OutputError, match="itself"):
        shards(images, images)
    first = shards(images, images / "out" / "shards")  # output inside the input is not taken for input
    (images / "out" / "shards" / "stray.png").write_bytes(make_png())
    assert shards(images, images / "out" / "shards") == first


def test_files_of_others_in_the_output_folder_stay_and_shards_of_others_are_not_mixed_with(images, tmp_path):
    (tmp_path / "out" / "papers").mkdir(parents=True)
    (tmp_path / "out" / "papers" / "thesis.doc").write_text("x")
    (tmp_path / "out" / ".draft.incomplete").write_text("y")
    index = shards(images, tmp_path / "out", shard_size=3)
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    assert index == shards(images, tmp_path / "out", shard_size=3)
    assert (tmp_path / "out" / "papers" / "thesis.doc").read_text() == "x"
    assert (tmp_path / "out" / ".draft.incomplete").read_text() == "y"
    for name in ("000001.tar", "mine.tar", "000000.tar.index", "index.json"):
        out = tmp_path / f"of {name}"
        out.mkdir()
        (out / name).write_bytes(b"theirs")
        with pytest.raises(OutputError, match=f"already contains {name}"):
            shards(images, out, shard_size=3)
        assert contents(out) == {name: b"theirs"}


def test_a_few_hundred_images_give_several_shards(tmp_path, make_png):
    sizes = {1: 16, 16: 16, 128: 16, 129: 17, 300: 38, 8000: 1000, 10**6: 1000}
    assert {count: default_shard_size(count) for count in sizes} == sizes
    (tmp_path / "images").mkdir()
    for number in range(40):
        (tmp_path / "images" / f"{number}.png").write_bytes(make_png(number, 2, 2))
    assert [shard.samples for shard in shards(tmp_path / "images", tmp_path / "out").shards] == [16, 16, 8]


def test_captions_labels_and_notes_go_along(images, tmp_path):
    for extension in ("cls", "caption", "json", "txt", "doc"):
        (images / "a" / f"0.{extension}").write_text(f"of {extension}")
    shards(images, tmp_path / "out")
    first = samples(tmp_path / "out")[0]
    assert {key: first[key] for key in first if not key.startswith("__") and key != "png"} == {
        "txt": b"of txt",
        "json": b"of json",
        "cls": b"of cls",
        "caption": b"of caption",
    }
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert tar.getnames()[:6] == ["a/0.png", "a/0.txt", "a/0.json", "a/0.cls", "a/0.caption", "a/1.png"]


def test_several_shards_are_written_at_once(images, tmp_path, monkeypatch):
    together = threading.Barrier(3, timeout=20)  # opens only when three shards have been begun
    fill = shards_module.fill_tar

    def wait_for_others(path, members):
        together.wait()
        fill(path, members)

    monkeypatch.setattr(shards_module, "fill_tar", wait_for_others)
    assert shards(images, tmp_path / "out", shard_size=3, workers=3).samples == 7


def test_larger_images_are_shrunk_and_smaller_ones_kept(tmp_path, make_png):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "large.png").write_bytes(make_png(1, 60, 90))
    (tmp_path / "images" / "small.png").write_bytes(make_png(2, 20, 90))
    (tmp_path / "images" / "large.txt").write_text("a caption")
    shards(tmp_path / "images", tmp_path / "png", resize=20)
    shards(tmp_path / "images", tmp_path / "jpg", resize=20, quality=90)
    large, small = samples(tmp_path / "png")
    assert decode_sample(large).image.shape == (3, 20, 30)
    assert large["txt"] == b"a caption"
    assert small["png"] == (tmp_path / "images" / "small.png").read_bytes()
    large, small = samples(tmp_path / "jpg")
    assert large["jpg"].startswith(b"\xff\xd8")
    assert "png" not in large
    assert small["png"] == (tmp_path / "images" / "small.png").read_bytes()
    with pytest.raises(OutputError, match="resize was 20 and is now 30"):
        shards(tmp_path / "images", tmp_path / "png", resize=30)


def test_an_unreadable_image_stops_and_leaves_nothing_that_looks_complete(images, tmp_path):
    data = (images / "b" / "5.png").read_bytes()
    (images / "b" / "5.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"5\.png") as caught:
        shards(images, tmp_path / "out", shard_size=3)
    assert "\n" not in str(caught.value)
    left = contents(tmp_path / "out")  # complete shards with their indexes, and an unfinished record
    assert "latentae.json" in left
    assert set(left) <= {"000000.tar", "000000.tar.index", "000002.tar", "000002.tar.index", "latentae.json"}


def test_bad_images_can_be_skipped_and_are_on_record(images, tmp_path):
    (images / "a" / "0.png").write_bytes(b"")
    (images / "b" / "5.png").write_bytes(b"<html>404</html>")
    with pytest.raises(ImageError):
        shards(images, tmp_path / "out", shard_size=3)
    index = shards(images, tmp_path / "out", shard_size=3, skip_bad=True)  # the same job resumes
    assert [shard.samples for shard in index.shards] == [2, 2, 1]
    records = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(record["file"], record["key"], record["shard"]) for record in records] == [
        ("a/0.png", "a/0", "000000.tar"),
        ("b/5.png", "b/5", "000001.tar"),
    ]
    assert all(record["reason"] for record in records)
    assert shards(images, tmp_path / "out", shard_size=3, skip_bad=True) == index
    (images / "a" / "1.png").write_bytes(b"x")
    # The first shard would have bad images only.
    index = shards(images, tmp_path / "left out", shard_size=2, skip_bad=True)
    assert [shard.name for shard in index.shards] == ["000001.tar", "000002.tar", "000003.tar"]
    assert index == load_index(expand_shards(tmp_path / "left out"))
    for path in images.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(ImageError, match="none of the 7"):
        shards(images, tmp_path / "none", skip_bad=True)
    assert not (tmp_path / "none" / "index.json").exists()


KILLED = """
import json, os, signal, sys
from pathlib import Path
from latentae.data import shards

def dying(function, when, seen):
    def call(*arguments, **options):
        seen.append(arguments)
        if len(seen) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

def die(what, when, workers):
    if what == "decoding":
        shards.decode_image = dying(shards.decode_image, when, [])
    elif what == "naming":  # the job's record, shards, indexes, the manifest and the record again are renamed
        Path.replace = dying(Path.replace, when, [])
    else:
        shards.scan_shard = dying(shards.scan_shard, when, [])
    shards.shards(sys.argv[1], f"{sys.argv[2]}/{what}-{when}", shard_size=2, skip_bad=True, workers=workers)

for case in json.loads(sys.argv[3]):
    child = os.fork()
    if not child:
        die(*case)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, case
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(images, tmp_path):
    (images / "a" / "2.png").write_bytes(b"bad")
    (images / "b" / "6.png").write_bytes(b"bad")  # the only one of its shard
    shards(images, tmp_path / "whole", shard_size=2, skip_bad=True)
    cases = [("decoding", 4, 1), ("decoding", 7, 4), ("naming", 2, 4), ("naming", 11, 2), ("indexing", 2, 2)]
    command = [sys.executable, "-c", KILLED, str(images), str(tmp_path), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for what, when, workers in cases:
        out = tmp_path / f"{what}-{when}"
        left = contents(out)
        assert '"finished": true' not in left["latentae.json"].decode()
        whole = [name for name in left if name.endswith(".tar")]
        if (what, workers) == ("decoding", 1):
            assert whole == ["000000.tar"]
            assert [name for name in left if name.endswith(".incomplete")]
        kept = {name: (out / name).stat().st_mtime_ns for name in whole if list(read_shard(out / name))}
        shards(images, out, shard_size=2, skip_bad=True)
        assert contents(out) == contents(tmp_path / "whole"), (what, when)
        assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept


def test_no_space_and_an_image_that_vanishes_are_one_line_and_leave_no_shard(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    read = Path.read_bytes

    def gone(self):
        if self.name == "2.png":
            raise PermissionError(13, "Permission denied")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(OutputError, match="No space left"):
            shards(images, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["latentae.json"]
    monkeypatch.setattr(Path, "read_bytes", gone)
    with pytest.raises(ImageError, match=r"2\.png .*Permission denied"):
        shards(images, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shard_size": 0}, "shard_size is 0, expected 1 or more"),
        ({"max_shard_mb": 0}, "expected above 0"),
        ({"resize": -1}, "expected 1 or more"),
        ({"workers": 0}, "expected 1 or more"),
        ({"resize": 8, "quality": 0}, "expected 1 to 100"),
        ({"quality": 90}, "give resize too"),
    ],
)
def test_impossible_settings_are_refused(images, tmp_path, values, message):
    with pytest.raises(RecipeError, match=message):
        shards(images, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_samples_from_memory_are_written_as_they_come(tmp_path):
    tiles = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8)
    given = (
        {"__key__": f"astronaut/{number:05}", "png": encode_png(tile)} for number, tile in enumerate(tiles)
    )
    index = write_shards(given, tmp_path / "out", shard_size=2)
    assert [shard.samples for shard in index.shards] == [2, 2, 1]
    found = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in found] == [f"astronaut/{number:05}" for number in range(5)]
    assert torch.equal(torch.stack([decode_image(sample["png"], "x") for sample in found]), tiles)
    with pytest.raises(OutputError, match="already contains"):
        write_shards([{"__key__": "a", "png": b"x"}], tmp_path / "out")


def test_keys_that_readers_would_misread_are_refused(tmp_path):
    for key in ("a.b", "a b", "__a__/b", "", "/a", "../a", "a/../b", None):
        with pytest.raises(DataError, match="key"):
            write_shards([{"__key__": key, "png": b"x"}], tmp_path / "out")  # type: ignore[dict-item]
        assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(DataError, match="two samples"):
        write_shards([{"__key__": "a", "png": b"x"}] * 2, tmp_path / "out")
    with pytest.raises(DataError, match="no samples"):
        write_shards([], tmp_path / "out2")
    write_shards([{"__key__": "a%20b", "png": b"x"}], tmp_path / "good")
    assert samples(tmp_path / "good")[0]["__key__"] == "a%20b"
