from __future__ import annotations

import torch
from small_models import weights_that_do_not_learn

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import preset
from latentae.models.initialization import set_initial_logvar, start_linear
from latentae.models.pending import Pending


def model(name: str = "tiny") -> AutoencoderKL:
    return AutoencoderKL(preset(name, block_out_channels=(16, 32, 64) if name == "tiny" else (16, 16, 32, 32), norm_num_groups=4))


def test_residual_branches_and_attention_add_nothing():
    autoencoder = model("kl-f8")
    start_linear(autoencoder)
    block, attention = autoencoder.encoder.mid_block.resnets[0], autoencoder.encoder.mid_block.attentions[0]
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(block(Pending(x)).value(), x)
    assert torch.equal(attention(Pending(x)).value(), x)


def test_the_trunk_keeps_the_variance_of_its_input():
    autoencoder = model()
    start_linear(autoencoder)
    x = torch.randn(4, 3, 64, 64)
    h = Pending(autoencoder.encoder.conv_in(x))
    for level in autoencoder.encoder.down_blocks:
        h = level(h)
    assert 0.5 < h.value().var().item() < 2


def test_every_weight_can_still_learn():
    autoencoder = model()
    start_linear(autoencoder)
    assert weights_that_do_not_learn(autoencoder, torch.randn(2, 3, 32, 32)) == []


def test_initial_logvar_is_a_shift():
    autoencoder, x = model(), torch.randn(1, 3, 32, 32)
    before = autoencoder.encode(x)
    set_initial_logvar(autoencoder, -6.0)
    after = autoencoder.encode(x)
    torch.testing.assert_close(after.logvar, before.logvar - 6)
    torch.testing.assert_close(after.mean, before.mean)
