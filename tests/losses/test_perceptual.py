from __future__ import annotations

import warnings
from urllib.error import URLError

import pytest
import torch
import torchvision
from latentae_kernels import use_backend

from latentae.data.decode import decode_image
from latentae.data.photos import photo_file
from latentae.data.transforms import resize_and_center_crop, to_float
from latentae.errors import WeightsError
from latentae.losses.perceptual import (
    LPIPS,
    EfficientNetDistance,
    build_perceptual,
    perceptual_available,
)


def photo(name: str, size: int) -> torch.Tensor:
    return to_float(resize_and_center_crop(decode_image(photo_file(name).read_bytes(), name), size)[None])


@pytest.fixture(scope="module")
def distance():
    return EfficientNetDistance()


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """SqueezeNet with random weights, saved as torchvision saves its own."""
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None)
    file = tmp_path_factory.mktemp("weights") / "squeezenet1_1.pth"
    torch.save(network.state_dict(), file)
    return network, file


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache and no network."""

    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    return tmp_path


def test_distance_is_zero_for_equal_images_symmetric_grows_with_noise_and_is_one_value_an_image(distance):
    x = photo("coffee.png", 64)
    noise = torch.randn_like(x)
    with torch.inference_mode():
        values = [distance(x, x + s * noise).item() for s in (0.0, 0.05, 0.1, 0.3)]
        assert values[0] == 0
        assert values == sorted(values)
        torch.testing.assert_close(distance(x, x + noise), distance(x + noise, x))
        x, y = torch.rand(2, 3, 3, 32, 48) * 2 - 1
        torch.testing.assert_close(distance(x, y)[1:2], distance(x[1:2], y[1:2]), rtol=1e-4, atol=1e-5)


def test_the_two_halves_make_the_distance(distance, squeezenet):
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    for module in (distance, LPIPS("squeeze", squeezenet[1])):
        torch.testing.assert_close(module.distance(module.features(x), module.features(y)), module(x, y))


def test_gradient_reaches_the_image_and_is_finite_even_where_it_vanishes(distance):
    x = photo("coffee.png", 64)
    y = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    distance(y, x).sum().backward()
    assert y.grad.abs().max() > 0
    black = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    distance(black, black.detach()).sum().backward()
    assert torch.isfinite(black.grad).all()
    assert all(p.grad is None for p in distance.parameters())


def test_training_mode_does_not_change_a_frozen_distance(squeezenet):
    assert not any(
        m.training for m in LPIPS("squeeze", squeezenet[1]).train().modules()
    )  # dropout would differ


@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_lpips_and_its_gradient_equal_the_packages_own(net, tmp_path):
    import lpips

    with warnings.catch_warnings():  # lpips 0.1.4 calls torchvision in its old way
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = {"features." + key.split(".", 1)[1]: value for key, value in theirs.net.state_dict().items()}
    torch.save(state, tmp_path / "trunk.pth")  # as torchvision names it
    ours = LPIPS(net, tmp_path / "trunk.pth")
    assert ours.name == f"LPIPS ({net})"
    x, y = (torch.rand(2, 3, 64, 48) * 2 - 1 for _ in range(2))
    x.requires_grad_()
    values = [module(x, y).flatten() for module in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(value.sum(), x)[0] for value in values]
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


def test_lpips_has_a_finite_gradient_without_features_and_without_a_difference(squeezenet, tmp_path):
    network, file = squeezenet
    ours = LPIPS("squeeze", file)
    x = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()
    same = ours(x, x.detach())
    assert same.item() == 0
    assert not torch.autograd.grad(same.sum(), x)[0].any()
    # without biases the image that the network sees as zero has no feature anywhere
    state = {
        key: value.clone().zero_() if key.endswith("bias") else value
        for key, value in network.state_dict().items()
    }
    torch.save(state, tmp_path / "no_bias.pth")
    ours = LPIPS("squeeze", tmp_path / "no_bias.pth")
    black = ours.network.scaling_layer.shift.expand(1, 3, 64, 64).clone().requires_grad_()
    assert not any(features.any() for features in ours.features(black))
    value = ours(black, x)
    assert value.item() > 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), (black, x)))
    assert torch.isfinite(torch.autograd.grad(ours(black, black.detach()).sum(), black)[0]).all()


def test_lpips_by_the_fused_kernels_is_the_same(squeezenet):
    ours = LPIPS("squeeze", squeezenet[1])
    x, y = (torch.rand(1, 3, 32, 40) * 2 - 1 for _ in range(2))
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where there is no GPU they are interpreted
    ours, x, y = ours.to(device), x.to(device).requires_grad_(), y.to(device)
    results = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            value = ours(x, y)
            results.append((value, *torch.autograd.grad(value.sum(), x)))
    for fused, native in zip(*results, strict=True):
        torch.testing.assert_close(fused, native, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("net", "file"), [("vgg", "vgg16-"), ("alex", "alexnet-"), ("squeeze", "squeezenet1_1-")]
)
def test_missing_weights_name_the_file_and_the_ways_out(net, file, offline):
    assert not perceptual_available(net)
    with pytest.raises(WeightsError) as caught:
        build_perceptual(net)
    message = str(caught.value)
    assert file in message
    assert "--loss.perceptual.weights" in message
    assert "efficientnet-lite0" in message
    assert "\n" not in message


def test_weights_in_the_cache_are_found(offline, squeezenet):
    name = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (offline / "checkpoints").mkdir()
    (offline / "checkpoints" / name).write_bytes(squeezenet[1].read_bytes())
    assert perceptual_available("squeeze")
    build_perceptual("squeeze")


def test_a_wrong_or_damaged_weights_file_is_named(tmp_path, squeezenet):
    with pytest.raises(WeightsError, match=r"nowhere\.pth do not exist"):
        LPIPS("alex", tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="AlexNet"):
        LPIPS("alex", squeezenet[1])
    broken = tmp_path / "broken.pth"
    broken.write_bytes(squeezenet[1].read_bytes()[:1000])
    with pytest.raises(WeightsError, match="damaged"):
        LPIPS("squeeze", broken)
