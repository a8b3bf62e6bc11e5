from __future__ import annotations

import numpy as np
import pytest
import torch
from latent_writer import make_samples, write_output

from latentae.encoding.formats import write
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import RecipeError


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_output(tmp_path_factory.mktemp("made") / "latents", {"a.tar": make_samples(2)})


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3)], ids=lambda seed: type(seed).__name__)
def test_equal_seeds_draw_the_same(latents, seed, tmp_path):
    drawn = [LatentDataset(latents, sample=True, flip=True, seed=one)[1].latent for one in (3, seed)]
    assert torch.equal(*drawn)
    for name, one in (("int", 3), ("other", seed)):
        write("fastdit", latents, tmp_path / name, seed=one)
    files = [(tmp_path / name / "imagenet256_features" / "1.npy").read_bytes() for name in ("int", "other")]
    assert files[0] == files[1]
    write("fastdit", latents, tmp_path / "int", seed=seed)  # the same job


@pytest.mark.parametrize("seed", [3.0, torch.Generator()], ids=lambda seed: type(seed).__name__)
def test_anything_but_a_whole_number_is_refused(latents, seed, tmp_path):
    with pytest.raises(RecipeError, match="expected a whole number"):
        LatentDataset(latents, seed=seed)
    with pytest.raises(RecipeError, match="expected a whole number"):
        write("fastdit", latents, tmp_path / "out", seed=seed)
