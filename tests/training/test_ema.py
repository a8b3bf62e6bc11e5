from __future__ import annotations

import pytest
import torch
from torch import nn

from latentae.training.optim import Ema


def test_a_weights_share_halves_in_its_half_life():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    ema = Ema(module, half_life_images=64)
    nn.init.zeros_(module.weight)
    for _ in range(8):
        ema.update(module, images_seen=1_000_000, batch_size=8)
    assert ema.weights["weight"].item() == pytest.approx(0.5)


def test_equals_the_plain_formula_and_forgets_the_start_early():
    module = nn.Linear(3, 2)
    ema = Ema(module, half_life_images=1000)
    expected = {k: v.detach().double() for k, v in module.named_parameters()}
    for step in range(1, 20):
        for p in module.parameters():
            p.data.normal_()
        ema.update(module, step * 16, 16)
        decay = 0.5 ** (16 / min(1000, step * 16 * 0.05))
        expected = {
            k: decay * expected[k] + (1 - decay) * v.detach().double() for k, v in module.named_parameters()
        }
    for key, value in ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)


def test_without_a_half_life_it_is_the_latest_and_it_never_shares_memory():
    module = nn.Linear(3, 2)
    ema = Ema(module, 0)
    module.weight.data.add_(1)
    assert not torch.equal(ema.weights["weight"], module.weight)
    ema.update(module, 100, 10)
    assert torch.equal(ema.weights["weight"], module.weight)


def test_half_precision_modules_are_averaged_in_fp32():
    ema = Ema(nn.Linear(2, 2).bfloat16(), 10)
    assert {v.dtype for v in ema.weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bias"), "lacks bias"),
        (lambda state: state.update(other=torch.zeros(1)), "has unknown other"),
        (lambda state: state.update(bias=torch.zeros(1)), r"bias has shape \(1,\), expected \(2,\)"),
    ],
)
def test_an_average_is_not_stretched_to_fit(change, message):
    ema = Ema(nn.Linear(3, 2), 10)
    state = dict(ema.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)


def test_stored_statistics_come_along_unchanged():
    module = nn.BatchNorm2d(2)
    nn.init.normal_(module.running_mean)
    ema = Ema(module, 10)
    assert ema.state_dict().keys() == module.state_dict().keys()
    other = Ema(nn.BatchNorm2d(2), 10)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())
