"""Weights files of perceptual networks: every form is read, wrong ones are refused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from latentae.errors import WeightsError
from latentae.losses.perceptual import LPIPS
from latentae.models.backbone import FrozenBackbone


@pytest.fixture(scope="module")
def state():
    return torchvision.models.squeezenet1_1(weights=None).state_dict()


@pytest.mark.parametrize("form", ["safetensors", "nested", "module."])
def test_every_form_of_the_file_is_read(form, state, tmp_path):
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save(
            {"state_dict": state, "epoch": 3}
            if form == "nested"
            else {form + key: v for key, v in state.items()},
            file,
        )
    network = LPIPS("squeeze", file).network.net
    assert torch.equal(network.slice1[0].weight, state["features.0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"features.13.weight": torch.zeros(3), "more.bias": torch.zeros(3)},
            r"has features\.13\.weight, more\.bias, so it is not",
        ),
        (
            {"features.0.weight": torch.zeros(4, 3, 3, 3)},
            r"does not fit \(size mismatch .*, so it is not torchvision's SqueezeNet1_1",
        ),
    ],
)
def test_what_another_network_has_is_refused(change, message, state, tmp_path):
    torch.save({**state, **change}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        LPIPS("squeeze", tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)


def test_a_backbone_refuses_what_it_does_not_have(tmp_path):
    import timm

    network = timm.create_model("test_resnet", pretrained=False)
    torch.save(
        {"module." + key: value for key, value in network.state_dict().items()}, tmp_path / "weights.pth"
    )
    FrozenBackbone("test_resnet", tmp_path / "weights.pth")
    torch.save({**network.state_dict(), "more.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="does not hold weights of test_resnet") as caught:
        FrozenBackbone("test_resnet", tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
