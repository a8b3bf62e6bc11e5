"""What can be read is taken, whatever its extension is called; what is left out is printed by kind and number."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from latentae.data.folder import escape_key, find_images, unescape_key
from latentae.data.shard_files import read_shard
from latentae.data.shards import shards
from latentae.errors import DataError
from latentae.tasks.inputs import open_images, read_labels


def image(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (9, 8), 1).save(file, kind)
    return file.getvalue()


READ = {
    "jfif": image("JPEG"),
    "jpe": image("JPEG"),
    "pjpeg": image("JPEG"),
    "mpo": image("JPEG"),
    "pgm": image("PPM", "L"),
    "pbm": image("PPM", "1"),
    "pnm": image("PPM"),
    "apng": image("PNG"),
    "dib": image("DIB"),
    "JPG": image("JPEG"),
}


def test_every_extension_of_a_format_that_is_read_is_taken(tmp_path):
    for extension, data in READ.items():
        (tmp_path / f"{extension}.{extension}").write_bytes(data)
    index = shards(tmp_path, tmp_path / "out")
    samples = [sample for shard in index.shards for sample in read_shard(shard.path)]
    assert {sample["__key__"] for sample in samples} == set(READ)
    assert all(sample[sample["__key__"].lower()] == READ[sample["__key__"]] for sample in samples)
    assert index.table(0).height.tolist() == [8] * len(READ)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        (folder / name).write_bytes(image("PNG"))
    for name in (
        "c.gif",
        "d.GIF",
        "e.heic",
        "deep/f.jp2",
        "g.txt",
        "h.csv",
        "no_extension",
        ".hidden.png",
        "deep/.DS_Store",
    ):
        (folder / name).write_bytes(b"?")
    return folder


def test_what_is_left_out_is_printed_by_kind_and_number(folder, tmp_path, capsys):
    shards(folder, tmp_path / "out")
    told = "2 images; left out: 2 .gif, 1 .heic, 1 .jp2 (convert them to PNG or JPEG); 2 hidden, 1 .csv, 1 .txt, 1 no extension"
    assert f"{folder}: {told}\n" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "latentae.json").read_text())
    assert record["left_out"] == {
        ".csv": 1,
        ".gif": 2,
        ".heic": 1,
        ".jp2": 1,
        ".txt": 1,
        "hidden": 2,
        "no extension": 1,
    }


def test_tasks_that_read_a_folder_print_it_too(folder, capsys):
    assert open_images(folder).count == 2
    assert "left out: 2 .gif" in capsys.readouterr().err


def test_a_folder_without_images_says_what_it_holds(folder):
    for name in ("a.png", "deep/b.png"):
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"found 2 \.gif, 1 \.heic.*expected jpg"):
        find_images(folder)


def test_a_broken_link_counts(folder, capsys):
    try:
        (folder / "lost.png").symlink_to(folder / "nowhere.png")
    except OSError:
        pytest.skip("this system makes no links")
    open_images(folder)
    assert "1 broken link" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_is_an_error(folder, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    monkeypatch.setattr("latentae.data.folder.os.walk", walk)
    with pytest.raises(DataError, match=r"images can't be read \(Permission denied\)"):
        find_images(folder)


def test_captions_and_labels_count_whatever_the_case_of_their_extension(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(image("PNG"))
    (folder / "a.TXT").write_text("a caption")
    (folder / "a.Cls").write_text("7")
    index = shards(folder, tmp_path / "out")
    (sample,) = read_shard(index.shards[0].path)
    assert (sample["txt"], sample["cls"]) == (b"a caption", b"7")
    for given in (folder, [folder / "a.png"]):
        (item,) = open_images(given).items([0], read_labels("auto")[0], channels=3, resolution=None)
        assert item.label == "7"
    (folder / "a.txt").write_text("another")
    if len(list(folder.glob("a.[tT]*"))) == 2:  # a file system that tells them apart
        with pytest.raises(DataError, match=r"a\.TXT and a\.txt in .* would both belong to a\.png"):
            find_images(folder)


def test_bad_images_are_counted_at_the_end_and_again_when_finished(folder, tmp_path, capsys):
    (folder / "bad.png").write_bytes(b"?")
    for _ in range(2):
        shards(folder, tmp_path / "out", skip_bad=True)
        told = capsys.readouterr().err
        assert f"; 1 unreadable images are left out, see {tmp_path / 'out' / 'bad_samples.jsonl'}" in told


@pytest.mark.parametrize("path", ["my photo.v2", "100%", "a%20b", "%41", "__x__/y", "\udcff", "été", "a\nb"])
def test_a_key_gives_its_path_back(path):
    assert unescape_key(escape_key(path)) == path


@pytest.mark.parametrize("key", ["my photo", "a%41", "50%", "%2e"])
def test_a_key_of_other_writers_stays(key):
    assert unescape_key(key) == key
