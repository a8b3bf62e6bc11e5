from __future__ import annotations

import pytest
import torch
from PIL import ImageFile
from pillow_files import pillow_file

from latentae.evaluation.methods.jpeg import Jpeg


@pytest.mark.parametrize("quality", [1, 50, 94, 100])
def test_files_are_pillows(smooth_images, quality: int):
    image = smooth_images(1, 40)[0]
    for variant, subsampling in (("4:4:4", 0), ("4:2:0", 2)):
        theirs = pillow_file(image, "JPEG", quality=quality, subsampling=subsampling, optimize=True)
        assert Jpeg().encode(image, quality, variant) == theirs
    gray = image[:1]
    assert Jpeg().encode(gray, quality, "") == pillow_file(gray, "JPEG", quality=quality, optimize=True)
    assert Jpeg().variants(1) == ("",)


def test_noise_takes_more_bytes_than_pillow_makes_room_for(capfd):
    noise = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)
    room = ImageFile.MAXBLOCK
    file = Jpeg().encode(noise, 100, "4:4:4")
    assert len(file) > max(2 * 256 * 256, room)  # what it makes room for where tables are optimised
    assert room == ImageFile.MAXBLOCK
    assert (Jpeg().decode(file, 3).int() - noise.int()).abs().max() <= 4
    found = Jpeg().within(noise, 2**20)
    assert found is not None
    assert (found.quality, found.variant) == (100, "4:4:4")
    assert not capfd.readouterr().err


def test_subsampling_is_chosen_by_what_is_in_the_image(smooth_images):
    colours = torch.zeros(3, 64, 64, dtype=torch.uint8)  # red and blue stripes: all of it is chroma
    colours[0, :, ::2] = 255
    colours[2, :, 1::2] = 255
    found = Jpeg().within(colours, 3000)
    assert found is not None
    assert found.variant == "4:4:4"
    photo = smooth_images(1, 64)[0]
    tight = Jpeg().within(photo, len(Jpeg().encode(photo, 20, "4:2:0")))
    assert tight is not None
    assert tight.variant == "4:2:0"
