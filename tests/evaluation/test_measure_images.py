from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from latentae.data.shard_files import expand_shards, read_shard
from latentae.data.shard_index import load_index
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ImageError, ModelError
from latentae.evaluation.measure_images import Instruments, Loaded, measure, samples_at
from latentae.evaluation.measurement import MODEL, QUANTIZED, Measurement, merge
from latentae.evaluation.methods.method import ModelMethod, Result
from latentae.measures.frechet import Extractor, frechet_distance
from latentae.measures.metrics import psnr, ssim
from latentae.measures.perceptual_distance import Distance
from latentae.models.latent_statistics import Moments

NONE = Distance(None, None, "not asked for")
COLORS = Extractor("FD-colors", 3, "mean color", "a test", lambda x: x.float().mean(dim=(2, 3)))


class Half:
    """A method that has no result for every second image."""

    name, label = "half", "half"

    def __call__(self, images, budgets):
        missing = frozenset(range(0, len(images), 2))
        return Result(
            images, {"bytes": [math.nan if row in missing else 1.0 for row in range(len(images))]}, missing
        )


def loaded(images, labels=None):
    for row, image in enumerate(images):
        yield Loaded(row, f"{row:03}", image, label="" if labels is None else labels[row])


def instruments(model, *methods, extractor: Extractor | None = COLORS):
    return Instruments(model.eval(), methods, NONE, extractor, torch.device("cpu"))


def test_rows_are_those_of_plain_code_however_images_are_batched(tiny_model, smooth_images):
    model, images = tiny_model(), smooth_images(7, 32)
    with torch.inference_mode():
        made = to_uint8(model.decode(model.encode(to_float(images)).mode()))
    for batch in (1, 3, 8):
        part = measure(instruments(model), loaded(images), batch)
        assert part.keys == [f"{row:03}" for row in range(7)]
        assert part.positions == list(range(7))
        np.testing.assert_allclose(part.scores[MODEL].values["psnr"], psnr(made, images), atol=0.02)
        np.testing.assert_allclose(part.scores[MODEL].values["ssim"], ssim(made, images), atol=1e-3)
        assert all(size > 0 for size in part.scores[QUANTIZED].values["bytes"])


def test_images_without_a_result_are_left_out_of_everything(tiny_model, smooth_images):
    part = measure(instruments(tiny_model(), Half()), loaded(smooth_images(6, 32)), 3)
    finite = np.isfinite(part.feature_rows("half")).all(axis=1)
    assert finite.tolist() == [False, True, False, False, True, False]
    assert [math.isnan(value) for value in part.scores["half"].values["psnr"]] == (~finite).tolist()
    total = merge([part])
    assert set(total.frechet()) == {MODEL, QUANTIZED}


def test_frechet_distances_are_those_of_all_features_at_once(tiny_model, smooth_images):
    model, images = tiny_model(), smooth_images(9, 32)
    chunks = [
        [item for item in loaded(images) if item.position in chunk] for chunk in (range(4), range(4, 9))
    ]
    total = merge([measure(instruments(model), chunk, 2) for chunk in chunks])
    with torch.inference_mode():
        made = to_uint8(model.decode(model.encode(to_float(images)).mode()))
    expected = frechet_distance(Moments.of(COLORS(made)), Moments.of(COLORS(images)))
    assert total.frechet()[MODEL] == pytest.approx(expected, rel=1e-2)
    assert total.halves is not None
    assert total.keys == [f"{row:03}" for row in range(9)]


def test_labels_become_a_probe(tiny_model, smooth_images):
    images = torch.cat([smooth_images(40, 32) // 4, 255 - smooth_images(40, 32, seed=1) // 4])
    labels = ["dark"] * 40 + ["light"] * 40
    probe = merge([measure(instruments(tiny_model(), extractor=None), loaded(images, labels), 16)]).probe()
    assert probe["classes"] == 2
    assert probe["accuracy"] > 0.9
    without = merge([measure(instruments(tiny_model(), extractor=None), loaded(images[:2]), 16)]).probe()
    assert "no labels" in without["skipped"]


def test_a_compared_model_that_diverged_has_no_result_and_the_model_itself_is_an_error(
    tiny_model, smooth_images
):
    model, images = tiny_model().eval(), smooth_images(2, 32)
    torch.nn.init.constant_(model.decoder.conv_out.bias, torch.nan)
    with torch.inference_mode():
        assert ModelMethod("other", "other", model)(images, [1, 1]).missing == {0, 1}
    with pytest.raises(ModelError, match="reconstruction of 000 has NaN"):
        measure(instruments(model), loaded(images), 2)
    with pytest.raises(ImageError, match="none of 1 images can be evaluated; the first: cut short"):
        merge([Measurement(skipped=[("a", "cut short")])])


def test_samples_at_reads_these_and_no_others(workspace):
    paths = expand_shards(workspace / "training")
    index, every = load_index(paths), [raw["__key__"] for path in paths for raw in read_shard(path)]
    positions = [0, 3, 9, 10, 19]
    found = list(samples_at(index, positions))
    assert [position for position, _ in found] == positions
    assert [raw["__key__"] for _, raw in found] == [every[position] for position in positions]
