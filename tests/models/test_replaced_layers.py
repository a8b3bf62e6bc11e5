"""Layers that users replace, wrap, hook or parametrize work as in diffusers."""

from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend
from small_models import DC_TWO_LEVELS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import latentae
from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.tiling import Tiled

diffusers = pytest.importorskip("diffusers")

KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
FAMILIES = ("kl", "dc")


class Scaled(nn.Module):
    """A wrapper that knows nothing of the layer it wraps."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        return self.factor * self.layer(*inputs, **options)


class Lora(nn.Module):
    """A low-rank branch next to a frozen layer, as adapters have it."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        if isinstance(base, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(
                base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False
            )
            self.up: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            assert isinstance(base, nn.Linear)
            self.down, self.up = (
                nn.Linear(base.in_features, rank, bias=False),
                nn.Linear(rank, base.out_features, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def models(family: str) -> dict[str, nn.Module]:
    """diffusers' model, ours and a fused one of diffusers, with the same weights."""
    torch.manual_seed(0)
    theirs = (
        diffusers.AutoencoderKL(**KL) if family == "kl" else diffusers.AutoencoderDC(**DC_TWO_LEVELS)
    ).eval()
    for name, p in theirs.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    config = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    ours: Autoencoder
    if family == "kl":
        ours = AutoencoderKL(
            AutoencoderKLConfig(
                **{name: config[name] for name in AutoencoderKLConfig.model_fields if name in config}
            )
        )
    else:
        ours = AutoencoderDC(
            AutoencoderDCConfig(
                **{name: config[name] for name in AutoencoderDCConfig.model_fields if name in config}
            )
        )
    ours.load_state_dict(theirs.state_dict())
    fused = copy.deepcopy(theirs)
    latentae.fuse(fused)
    return {"diffusers": theirs, "ours": ours.eval(), "fused": fused}


def image_of(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, Autoencoder):
        return model.decode(model.encode(x).mode())
    encoded = model.encode(x)  # pyright: ignore[reportCallIssue]
    latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return model.decode(latent).sample  # pyright: ignore[reportCallIssue]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with parameters, by the names that diffusers gives them."""
    return {
        name: m for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None
    }


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def assert_images_agree(images: dict[str, Tensor], what: str = "all layers", tolerance: float = 1e-4) -> None:
    for kind in ("ours", "fused"):
        error = float((images[kind] - images["diffusers"]).abs().max())
        assert error <= tolerance * max(1.0, float(images["diffusers"].abs().max())), (
            f"{kind}, {what}: off by {error}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapper_around_any_layer_counts(family):
    found, x = models(family), torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        for name in layers_of(found["ours"]):
            images = {}
            for kind, model in found.items():
                layer = model.get_submodule(name)
                replace(model, name, Scaled(layer, 2))
                images[kind] = image_of(model, x)
                replace(model, name, layer)
            assert_images_agree(images, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrappers_around_all_layers_count_on_the_kernels(family):
    found, x, images = models(family), torch.randn(1, 3, 4, 4), {}
    names = list(layers_of(found["ours"]))
    with torch.no_grad(), use_backend("triton"):
        for kind, model in found.items():
            for name in names:
                replace(model, name, Scaled(model.get_submodule(name), 1.1))
            images[kind] = image_of(model, x)
    assert_images_agree(images)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hooked_module_fires_once_and_its_output_stays(family, grad):
    found, x = models(family), torch.randn(1, 3, 4, 4)
    fired: dict[str, list[str]] = {}
    for kind, model in found.items():
        seen: list[tuple[str, Tensor, Tensor]] = []

        def remember(module, inputs, output, name, seen=seen):
            assert isinstance(output, Tensor), name
            assert all(isinstance(value, Tensor | None) for value in inputs), name
            seen.append((name, output, output.detach().clone()))

        for name, module in model.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                module.register_forward_hook(
                    lambda m, i, o, name=name, remember=remember: remember(m, i, o, name)
                )
        with torch.set_grad_enabled(grad):
            image_of(model, x)
        for name, output, copied in seen:
            assert torch.equal(output, copied), f"{kind}: the output of {name} was overwritten after its hook"
        fired[kind] = [name for name, _, _ in seen]
    assert sorted(fired["fused"]) == sorted(fired["diffusers"])
    known = {name for name, _ in found["ours"].named_modules()}
    assert sorted(fired["ours"]) == sorted(name for name in fired["diffusers"] if name in known)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_that_change_inputs_and_outputs_count(family):
    found, x = models(family), torch.randn(1, 3, 4, 4)
    names = [name for name, m in found["ours"].named_modules() if name and not isinstance(m, nn.ModuleList)]
    with torch.no_grad():
        plain = image_of(found["diffusers"], x)
        for name in names:
            images = {}
            for kind, model in found.items():
                module = model.get_submodule(name)
                handles = (
                    module.register_forward_pre_hook(lambda m, inputs: (inputs[0] + 0.5, *inputs[1:])),
                    module.register_forward_hook(lambda m, inputs, output: 1.5 * output),
                )
                images[kind] = image_of(model, x)
                for handle in handles:
                    handle.remove()
            assert_images_agree(images, name)
        assert_images_agree(
            {"diffusers": plain} | {kind: image_of(found[kind], x) for kind in ("ours", "fused")}
        )


def old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(1.5)  # pyright: ignore


def new_weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)  # pyright: ignore


def pruned(layer: nn.Module) -> None:
    weight = layer.weight  # pyright: ignore
    prune.custom_from_mask(layer, "weight", (weight.abs() > weight.abs().median()).to(weight))


@pytest.mark.parametrize("change", [old_weight_norm, new_weight_norm, pruned, nn.utils.spectral_norm])
@pytest.mark.parametrize("family", FAMILIES)
def test_parametrized_and_pruned_weights_count(family, change):
    found, x = models(family), torch.randn(1, 3, 4, 4)
    names = [
        name for name, layer in layers_of(found["ours"]).items() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    images = {}
    for kind, model in found.items():
        for name in names:
            torch.manual_seed(1)  # spectral_norm draws its first vectors
            change(model.get_submodule(name))
        with torch.no_grad():
            images[kind] = image_of(model.eval(), x)
    assert_images_agree(images, tolerance=1e-3)


@pytest.mark.parametrize(("checkpointing", "backend"), [(False, "torch"), (True, "torch"), (False, "triton")])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_the_image_and_learn(family, checkpointing, backend):
    found, x = models(family), torch.randn(1, 3, 4, 4)
    names = [
        name for name, layer in layers_of(found["ours"]).items() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    results = {}
    for kind, model in found.items():
        model.requires_grad_(False)
        if checkpointing and isinstance(model, Autoencoder):
            model.gradient_checkpointing = True
        elif checkpointing and family == "kl":
            model.train().enable_gradient_checkpointing()  # pyright: ignore
        torch.manual_seed(1)
        adapters = []
        for name in [
            name
            for name in names
            if name.rpartition(".")[2] in ("conv1", "conv2", "to_q", "conv", "conv_out", "0")
        ]:
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear) or layer.groups == 1:  # pyright: ignore
                adapter = Lora(layer)
                replace(model, name, adapter)
                adapters += [adapter.down.weight, adapter.up.weight]
        with use_backend(backend):
            image = image_of(model, x)
            results[kind] = (image, *torch.autograd.grad(image.square().sum(), adapters))
    assert len(results["ours"]) > 10
    for kind in ("ours", "fused"):
        for ours, theirs in zip(results[kind], results["diffusers"], strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max())
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_accelerate_offloads_come_back_for_each_layer(family):
    accelerate = pytest.importorskip("accelerate")
    found, x = models(family), torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        plain = image_of(found["diffusers"], x)
        for kind in ("ours", "fused"):
            model = accelerate.cpu_offload(found[kind], torch.device("cpu"))
            torch.testing.assert_close(image_of(model, x), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_settings_of_a_convolution_count(family):
    """Circular padding makes textures that tile: users set it on every convolution."""
    found, x = models(family), torch.randn(1, 3, 4, 4)
    images = {}
    for kind, model in found.items():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
                module.padding_mode = "circular"
                module._reversed_padding_repeated_twice = [
                    p for p in reversed(module.padding) for _ in range(2)
                ]  # pyright: ignore
        with torch.no_grad():
            images[kind] = image_of(model, x)
    assert_images_agree(images)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_block_or_half_gets_a_tensor(family):
    found, x = models(family), torch.randn(1, 3, 4, 4)
    level = "decoder.up_blocks.1"
    block = "decoder.up_blocks.1.resnets.0" if family == "kl" else "decoder.up_blocks.0.1"
    for name in (level, block, "encoder", "decoder"):
        images = {}
        for kind, model in found.items():
            inner = model.get_submodule(name)
            replace(model, name, Scaled(inner, 2))
            with torch.no_grad():
                images[kind] = image_of(model, x)
            replace(model, name, inner)
        assert_images_agree(images, name)


def test_a_layer_put_in_place_of_a_fused_one_is_used():
    """A normalization that replaces the fused one later needs the last activation again."""
    found, x = models("kl"), torch.randn(1, 3, 4, 4)
    images = {}
    for kind in ("diffusers", "fused"):
        model = found[kind]
        norm = nn.GroupNorm(4, 8, eps=1e-6)
        norm.load_state_dict(model.get_submodule("decoder.conv_norm_out").state_dict())
        replace(model, "decoder.conv_norm_out", norm)
        replace(model, "encoder.conv_act", nn.GELU())
        replace(model, "decoder.up_blocks.0.resnets.0.nonlinearity", nn.ReLU())
        with torch.no_grad():
            images[kind] = image_of(model, x)
    torch.testing.assert_close(images["fused"], images["diffusers"], rtol=1e-4, atol=1e-4)


def test_a_frozen_model_learns_through_a_hook():
    """A hook can bring in a tensor that learns, so a frozen block that has one builds a graph."""
    model, x = models("kl")["ours"].requires_grad_(False), torch.randn(1, 3, 4, 4)
    shift = torch.zeros(1, requires_grad=True)
    model.get_submodule("encoder.down_blocks.0.resnets.0.conv1").register_forward_hook(
        lambda m, i, o: o + shift
    )
    image_of(model, x).sum().backward()
    assert shift.grad is not None
    assert shift.grad.abs() > 0


def test_tiling_names_the_layers_that_it_can_not_split():
    model = models("kl")["ours"]
    name = "decoder.mid_block.resnets.0.conv1"
    replace(model, name, Scaled(model.get_submodule(name), 2))
    with pytest.raises(ModelError, match=f"{name} is a Scaled"):
        Tiled(model)  # pyright: ignore[reportArgumentType]


def test_weights_of_videos_keep_their_order_and_output():
    """Stable Video Diffusion's decoder also has convolutions over time."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        latent = vae.encode(x).latent_dist.mode()
        expected = vae.decode(latent, num_frames=2).sample
        with latentae.fuse(vae):
            torch.testing.assert_close(vae.encode(x).latent_dist.mode(), latent, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                vae.decode(latent, num_frames=2).sample, expected, rtol=1e-4, atol=1e-4
            )
