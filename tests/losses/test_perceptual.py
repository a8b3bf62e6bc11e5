from __future__ import annotations

import warnings
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from latentae_kernels import use_backend
from safetensors.torch import save_file

from latentae.data.builtin import photo_file
from latentae.data.decode import decode_image
from latentae.data.transforms import resize_and_center_crop, to_float
from latentae.errors import WeightsError
from latentae.losses.options import ClassifierOptions
from latentae.losses.perceptual import (
    LPIPS,
    ClassifierDistance,
    EfficientNetDistance,
    build_perceptual,
    gram_distance,
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


def plain_gram(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """One image: per layer [N, h, w], the sums of Gatys et al. 2016 written out."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        n, m = x.shape[0], x.shape[1] * x.shape[2]
        energy = sum(((x[i] * x[j]).sum() - (y[i] * y[j]).sum()) ** 2 for i in range(n) for j in range(n))
        total += energy / (4 * n**2 * m**2) / len(a)
    return total


def test_gram_equals_the_published_sums_in_fp64():
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 4, 5), (2, 6, 2, 2)]
    a, b = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    got = gram_distance([torch.tensor(x) for x in a], [torch.tensor(x) for x in b])
    expected = [plain_gram([x[i] for x in a], [x[i] for x in b]) for i in range(2)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_gram_ignores_where_things_are():
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert gram_distance([x], [x.roll((2, 3), (2, 3))]).max() < 1e-24
    assert gram_distance([x], [2 * x]).min() > 0.01


def test_gram_half_precision_features_are_multiplied_in_fp32():
    x, y = (torch.randn(1, 8, 16, 16).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = gram_distance([x], [y])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), gram_distance([x.double()], [y.double()]), rtol=1e-4, atol=0)


def test_the_classifier_equals_the_plain_formula_in_fp64(tmp_path):
    network = timm.create_model("test_convnext").eval().double()
    save_file(network.state_dict(), tmp_path / "convnext.safetensors")
    loss = ClassifierDistance(
        ClassifierOptions(
            weight=0.1, backbone="test_convnext", weights=str(tmp_path / "convnext.safetensors")
        )
    ).double()
    x, y = (torch.rand(2, 3, 40, 48, dtype=torch.float64) * 2 - 1 for _ in range(2))
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))

    def logits(image):
        unit = F.interpolate(image / 2 + 0.5, size=config["input_size"][1:], mode="bilinear", antialias=True)
        return network((unit - mean) / std)

    with torch.no_grad():
        expected = ((logits(x) - logits(y)) ** 2).mean(dim=1)
    # the backbone keeps mean and std in fp32 until it is converted to double
    torch.testing.assert_close(loss(x, y), expected, rtol=1e-6, atol=0)
    assert not loss(x, x).any()


def test_the_classifiers_gradient_reaches_the_image_and_nothing_is_learned():
    loss = ClassifierDistance(ClassifierOptions(weight=0.1, backbone="efficientnet-lite0"))
    assert not list(loss.parameters())
    assert not loss.state_dict()
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    loss(x, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert x.grad.abs().max() > 0
