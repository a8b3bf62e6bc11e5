from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from latentae.data.folder import check_file_names, escape_key, find_images, unescape_key
from latentae.data.shard_files import read_shard, shard_keys
from latentae.data.shards import shards
from latentae.errors import DataError, OutputError
from latentae.files import atomic_file
from latentae.tasks.inputs import open_images, read_labels


def keys(*arguments) -> list[str]:
    return [image.key for image in find_images(*arguments)]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a/b", "a/b"),
        ("my photo.v2", "my%20photo%2Ev2"),
        ("100%", "100%25"),
        ("__MACOSX__/x", "%5F_MACOSX__/x"),
        ("été/東京", "été/東京"),
        ("a\nb", "a%0Ab"),
        ("bad\udcff", "bad%FF"),
    ],
)
def test_keys_are_readable_and_escape_only_what_they_must(path, key):
    assert escape_key(path) == key


paths = st.lists(st.text("ab1._ %-\\\n~é東\U0001f600", min_size=1, max_size=8), min_size=1, max_size=3).map(
    "/".join
)


@given(paths, paths)
@settings(max_examples=60, deadline=None)
def test_no_two_paths_share_a_key(first, second):
    assume(first != second)
    assert escape_key(first) != escape_key(second)


@given(path=paths)
@settings(max_examples=60, deadline=None)
def test_a_key_comes_back_from_a_shard_as_it_went_in(tmp_path_factory, write_tar, path):
    key = escape_key(path)
    path = write_tar(tmp_path_factory.getbasetemp() / "key.tar", [(f"{key}.jpg", b"x"), (f"{key}.txt", b"y")])
    assert shard_keys(path) == [key]


@pytest.fixture
def tree(tmp_path, make_png):
    images = ("b/2.png", "b/1.jpeg", "a/x.PNG", "c.png", ".hidden.png", ".git/y.png", "._c.png", "movie.gif")
    for name in (*images, "notes.txt", "b/1.txt", "b/1.json", "b/1.cls", "b/1.caption"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_png())
    return tmp_path


def test_images_are_found_in_sorted_order_with_what_belongs_to_them(tree):
    images = find_images(tree)
    assert [image.key for image in images] == ["a/x", "b/1", "b/2", "c"]
    assert [side.name for side in images[1].sidecars] == ["1.txt", "1.json", "1.cls", "1.caption"]
    assert images[0].sidecars == ()
    assert keys(tree, tree / "b") == ["a/x", "c"]


def test_links_are_followed_once_and_loops_end(tree, tmp_path_factory, make_png):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "far.png").write_bytes(make_png())
    try:
        (tree / "a" / "up").symlink_to(tree)
        (tree / "a" / "again").symlink_to(tree / "b")
        (tree / "linked").symlink_to(outside)
        (outside / "back").symlink_to(tree)
        (tree / "d.png").symlink_to(tree / "c.png")
        (tree / "e.png").symlink_to(tree / "nowhere.png")
    except OSError:
        pytest.skip("this system makes no links")
    assert keys(tree) == ["a/x", "b/1", "b/2", "c", "d", "linked/far"]


def test_no_folder_no_image_and_two_files_with_one_key_are_errors(tmp_path):
    for name in ("file.png", "twice/c.jpg", "twice/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.jpg and .*c\.png .*'c'"):
        find_images(tmp_path / "twice")
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "missing")
    with pytest.raises(DataError, match="is a file"):
        find_images(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image under"):
        find_images(tmp_path / "empty")


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
    images = "2 images; left out: 2 .gif, 1 .heic, 1 .jp2 (convert them to PNG or JPEG)"
    assert f"{folder}: {images}; 2 hidden, 1 .csv, 1 .txt, 1 no extension\n" in capsys.readouterr().err
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
    for images in (folder, [folder / "a.png"]):
        (item,) = open_images(images).items([0], read_labels("auto")[0], channels=3, resolution=None)
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
