from __future__ import annotations

import pytest
import torch
from small_models import dc_config, images_of, weights_that_do_not_learn

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.initialization import set_deterministic, set_initial_logvar, start_linear
from latentae.models.linear import LinearAutoencoder
from latentae.models.presets import preset


def model(name: str = "tiny") -> AutoencoderKL:
    return AutoencoderKL(
        preset(
            name, block_out_channels=(16, 32, 64) if name == "tiny" else (16, 16, 32, 32), norm_num_groups=4
        )
    )


def test_residual_branches_and_attention_add_nothing():
    autoencoder = model("kl-f8")
    start_linear(autoencoder)
    block, attention = autoencoder.encoder.mid_block.resnets[0], autoencoder.encoder.mid_block.attentions[0]
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(block(x), x)
    assert torch.equal(attention(x), x)


def test_the_trunk_keeps_the_variance_of_its_input():
    autoencoder = model()
    start_linear(autoencoder)
    x = torch.randn(4, 3, 64, 64)
    h = autoencoder.encoder.conv_in(x)
    for level in autoencoder.encoder.down_blocks:
        h = level(h)
    assert 0.5 < h.var().item() < 2


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


@pytest.mark.parametrize("norm", ["rms_norm", "batch_norm"])
def test_a_linear_start_is_linear_up_to_the_latent_and_keeps_the_variance(norm):
    model = (
        AutoencoderDC(
            dc_config(bottleneck="gaussian", decoder_norm_types=norm, encoder_layers_per_block=(2, 2, 2))
        )
        .double()
        .eval()
    )
    start_linear(model)
    a, b = (torch.randn(2, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        means = model.encode(a).mean, model.encode(b).mean, model.encode(2 * a - 3 * b).mean
        torch.testing.assert_close(means[2], 2 * means[0] - 3 * means[1], rtol=1e-10, atol=1e-10)
        assert (model.encode(a).logvar == 0).all()
        assert 0.2 < means[0].std() < 4
        decoded = model.decode(means[0] / means[0].std())
    assert 0.2 < decoded.std() < 4
    model(a).reconstruction.square().mean().backward()  # and branches come alive in the next step
    assert all(
        p.grad.abs().max() > 0
        for name, p in model.named_parameters()
        if name.endswith(("norm.weight", "attn.norm_out.weight"))
    )


def test_the_spread_at_the_start_can_be_set_where_there_is_a_posterior():
    model = AutoencoderDC(dc_config(bottleneck="gaussian"))
    x = images_of(model, 3)
    set_initial_logvar(model, -6.0)
    torch.testing.assert_close(model.encode(x).logvar, torch.full((2, 4, 3, 3), -6.0))
    torch.nn.init.normal_(model.encoder.conv_out_logvar.weight)
    set_deterministic(model)
    assert (model.encode(x).logvar == -30).all()
    model = AutoencoderDC(dc_config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_deterministic(model)
    set_initial_logvar(model, 0.0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ModelError, match="log-variance is -6, but a AutoencoderDC without a posterior"):
        set_initial_logvar(model, -6.0)
    with pytest.raises(ModelError, match="no linear start"):
        start_linear(LinearAutoencoder(LinearAutoencoderConfig()))
