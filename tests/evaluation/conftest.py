from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import smooth_images, tiny_model, write_images

from latentae.data.shards import shards
from latentae.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, held-out shards (5 images) and training shards (20 images in 2 shards)."""
    root = tmp_path_factory.mktemp("evaluation")
    tiny_model().save_pretrained(root / "model")
    shards(write_images(root / "held <b>&", smooth_images(5, 48)), root / "held_out")
    shards(write_images(root / "seen", smooth_images(20, 48, seed=1)), root / "training", shard_size=10)
    return root


@pytest.fixture(scope="session")
def evaluation(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and result of one evaluation with everything in it, on the images of `workspace`."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("out") / "evaluation"
    shutil.copytree(workspace / "model", run / "model")
    options = {"pca_shards": workspace / "training", "perceptual": "none", "frechet": "none", "batch_size": 2}
    return out, evaluate(run / "model", workspace / "held_out", out=out, **options)
