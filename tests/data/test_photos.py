from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from latentae.data.builtin import HELD_OUT, TRAINING, photo_file, photo_tiles, write_photo_tiles
from latentae.data.decode import decode_image


def test_held_out_photos_are_other_photos():
    assert not set(HELD_OUT) & set(TRAINING)
    images = {
        name: decode_image(photo_file(name).read_bytes(), name).float() for name in (*HELD_OUT, *TRAINING)
    }
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


@pytest.mark.parametrize(("size", "stride"), [(300, 128), (128, 128), (100, 50), (299, 1)])
def test_tiles_start_inside_and_the_last_ends_flush(size, stride):
    keys = [key.removeprefix("chelsea/").split("-") for key, _ in photo_tiles(("chelsea.png",), size, stride)]
    for axis, length in enumerate((300, 451)):
        starts = sorted({int(key[axis]) for key in keys})
        assert (starts[0], starts[-1] + size) == (0, length)
        assert all(after - before <= stride for before, after in pairwise(starts))
    assert len({tuple(key) for key in keys}) == len(keys)
