from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from latentae.data.folder import escape_key, find_images
from latentae.data.shard_files import shard_keys
from latentae.errors import DataError


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
