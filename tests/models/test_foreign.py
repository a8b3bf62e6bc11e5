from __future__ import annotations

import json

import pytest
import torch

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.foreign import ForeignAutoencoder, load_any_model
from latentae.models.presets import preset

diffusers = pytest.importorskip("diffusers")


def tiny(cls, **changes):
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = [f"{side}_block_out_channels" for side in ("encoder", "decoder", "down", "up")]
    shapes = {
        "AutoencoderTiny": {
            **dict.fromkeys(widths[:2], (8, 8)),
            **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1)),
        },
        "VQModel": {"block_out_channels": (8, 8), "norm_num_groups": 4, **levels, "num_vq_embeddings": 16},
        "AsymmetricAutoencoderKL": {**dict.fromkeys(widths[2:], (8, 8)), "norm_num_groups": 4, **levels},
    }
    return getattr(diffusers, cls)(**{**shapes[cls], **changes}).eval()


@pytest.mark.parametrize("cls", ["AutoencoderTiny", "VQModel", "AsymmetricAutoencoderKL"])
@torch.inference_mode()
def test_any_image_autoencoder_of_diffusers_gives_its_own_outputs(cls, tmp_path):
    theirs = tiny(cls)
    theirs.save_pretrained(tmp_path / "model")
    ours, source = load_any_model(tmp_path / "model")
    assert isinstance(ours, ForeignAutoencoder)
    assert ours.config.kind == cls
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    encoded = theirs.encode(x)
    latent = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    posterior = ours.encode(x)
    torch.testing.assert_close(posterior.mode(), latent)
    f = ours.config.downsampling
    assert latent.shape == (2, ours.config.latent_channels, 32 // f, 48 // f)
    torch.testing.assert_close(ours.decode(latent), theirs.decode(latent).sample)
    if hasattr(encoded, "latent_dist"):
        torch.testing.assert_close(posterior.std, encoded.latent_dist.std)
    else:
        assert posterior.std.max() < 1e-6
    assert source.fingerprint == load_any_model(tmp_path / "model")[1].fingerprint
    torch.nn.init.normal_(next(theirs.parameters()))  # other weights have another fingerprint
    theirs.save_pretrained(tmp_path / "other")
    assert source.fingerprint != load_any_model(tmp_path / "other")[1].fingerprint


def test_our_own_classes_stay_ours(tmp_path):
    AutoencoderKL(preset("tiny")).save_pretrained(tmp_path / "vae")
    for path in (tmp_path / "vae", tmp_path):  # the folder of a pipeline has one
        assert isinstance(load_any_model(path)[0], AutoencoderKL)


def test_what_is_no_image_autoencoder_is_refused_in_one_line(tmp_path):
    config = tmp_path / "model" / "config.json"
    config.parent.mkdir()
    for values, message in [
        ({"_class_name": "AutoencoderOfNobody"}, "neither this library nor diffusers"),
        ({"_class_name": "DDPMScheduler"}, "neither this library nor diffusers"),
        ({"_class_name": "AutoencoderTiny"}, "could not load the AutoencoderTiny"),
    ]:
        config.write_text(json.dumps(values))
        with pytest.raises(ModelError, match=message) as caught:
            load_any_model(config.parent)
        assert "\n" not in str(caught.value)
    levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
    model = diffusers.UNet2DModel(**shape, **levels)
    model.save_pretrained(tmp_path / "unet")
    with pytest.raises(ModelError, match="does not take images"):
        load_any_model(tmp_path / "unet")
