from __future__ import annotations

import numpy as np
import torch
from digit_files import note, pixels

import latentae
from latentae.models.linear import LinearAutoencoder


def test_a_strip_begins_and_ends_with_the_reconstructions(made, tmp_path):
    model, inputs, images = made
    result = latentae.interpolate(
        model, inputs / "0001.png", inputs / "0002.png", tmp_path / "strip.png", steps=5, mode="spherical"
    )
    found = note(tmp_path / "strip.png")
    assert found == {key: value for key, value in result.items() if key != "file"}
    assert (found["mode"], found["a"], found["b"]) == ("spherical", "0001", "0002")
    strip = pixels(tmp_path / "strip.png")
    assert strip.shape == (2 * 132 + 4, 5 * 132 + 4, 3)
    network = LinearAutoencoder.from_pretrained(model)
    with torch.no_grad():
        ends = network.decode(network.encode(images[1:3].float() / 127.5 - 1).mode())[:, 0].numpy()
    for column, end in ((0, ends[0]), (4, ends[1])):
        expected = ((end + 1) * 127.5).round().clip(0, 255)
        for row in (0, 1):
            left, top = 4 + 132 * column, 4 + 132 * row
            assert np.abs(strip[top : top + 128 : 16, left : left + 128 : 16, 0] - expected).max() <= 1
