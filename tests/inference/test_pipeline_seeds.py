from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latentae.errors import RecipeError
from latentae.inference.pipeline import LatentPipeline
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.linear import LinearAutoencoder


def test_a_sample_is_drawn_by_the_number_of_its_seed():
    pipe = LatentPipeline(
        LinearAutoencoder(LinearAutoencoderConfig(latent_channels=2, patch=8, sample_size=8))
    )
    image = np.zeros((8, 8, 3), np.uint8)
    seeds: list[Any] = [3, np.int64(3), torch.tensor(3)]
    drawn = [pipe.encode(image, sample=True, seed=seed).tensors[0] for seed in seeds]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    for seed in (3.0, torch.Generator()):
        with pytest.raises(RecipeError, match="expected a whole number"):
            pipe.encode(image, sample=True, seed=seed)  # pyright: ignore[reportArgumentType]
