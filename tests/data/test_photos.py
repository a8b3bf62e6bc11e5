from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentae.data.decode import decode_image
from latentae.data.photos import HELD_OUT, TRAINING, _starts, photo_file, write_photo_tiles


def test_held_out_photos_are_other_photos():
    assert not set(HELD_OUT) & set(TRAINING)
    images = {name: decode_image(photo_file(name).read_bytes(), name).float() for name in (*HELD_OUT, *TRAINING)}
    for name in HELD_OUT:
        assert images[name].shape[0] == 3
        assert (images[name][0] - images[name][1]).abs().mean() > 1, "held-out photos are in colour"


def test_tiles_are_cut_from_the_photo_and_cover_it(tmp_path):
    count = write_photo_tiles(tmp_path, ("chelsea.png",), 128, 128)
    files = sorted((tmp_path / "chelsea").iterdir())
    assert len(files) == count == 4 * 3
    with Image.open(photo_file("chelsea.png")) as photo:
        whole = np.asarray(photo)
    covered = np.zeros(whole.shape[:2], bool)
    for file in files:
        top, left = map(int, file.stem.split("-"))
        with Image.open(file) as tile:
            assert np.array_equal(np.asarray(tile), whole[top : top + 128, left : left + 128])
        covered[top : top + 128, left : left + 128] = True
    assert covered.all()


@given(st.integers(8, 300), st.integers(1, 8), st.integers(1, 8))
def test_tiles_start_inside_and_the_last_ends_flush(length, size, stride):
    starts = list(_starts(length, size, stride))
    assert starts[0] == 0
    assert starts[-1] + size == length
    assert len(set(starts)) == len(starts)
