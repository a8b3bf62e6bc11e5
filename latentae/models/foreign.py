"""Image autoencoders that only diffusers defines, with this library's interface."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from latentae.errors import MissingDependencyError, ModelError, first_line, some
from latentae.files import sha256
from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.config import (
    CONFIGS,
    AutoencoderConfig,
    ChannelsIn,
    ChannelsOut,
    LatentChannels,
    SampleSize,
    ScalingFactor,
    ShiftFactor,
    read_config_values,
)
from latentae.models.pretrained import CONFIG, ModelSource, folder_weights, hub_id, load_model

__all__ = ["ForeignAutoencoder", "ForeignConfig", "load_any_model"]

TRIAL = 128  # side of the image that shows the downsampling; every class of diffusers takes it


class ForeignConfig(AutoencoderConfig):
    """The shape of a foreign model, found by encoding one image."""

    class_name = ""

    kind: str = Field(description="Its class in diffusers.")
    in_channels: ChannelsIn = 3
    out_channels: ChannelsOut = 3
    latent_channels: LatentChannels = 4
    factor: int = Field(default=8, ge=1, description="Image pixels per latent pixel along a side.")
    sample_size: SampleSize = 256
    scaling_factor: ScalingFactor = 1.0
    shift_factor: ShiftFactor = 0.0

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""
        return self.factor


class ForeignAutoencoder(Autoencoder):
    """A diffusers model with the interface of this library, only for inference.

    Its posterior is that of its `encode`, or the latents with the smallest variance. A quantized
    model (VQModel) gives the latents before quantization, and its decoder quantizes them.
    """

    config: ForeignConfig

    def __init__(self, module: nn.Module, config: ForeignConfig) -> None:
        super().__init__()
        self.module = module
        self.config = config

    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        return _posterior(self.module, x), None

    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        return _image(self.module, z), None


def load_any_model(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu"
) -> tuple[Autoencoder, ModelSource]:
    """`load_model`, also for any image autoencoder in a diffusers folder; in evaluation mode.

    Raises:
        ModelError: see `load_model`; or a class that is not in diffusers, or no autoencoder of
            images.
        MissingDependencyError: the folder needs diffusers, which is not installed.
    """
    folder = _foreign_folder(path)
    if folder is None:
        return load_model(path, weights, device)
    values = read_config_values(folder / CONFIG)
    module = _load(folder, values).to(device)
    config = _config(module, values, folder)
    files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    digest = hashlib.sha256("".join(sha256(file) for file in (*files, folder / CONFIG)).encode()).hexdigest()
    file = folder_weights(folder) or folder / CONFIG
    source = ModelSource(Path(path), file, config, "folder", config.image_side, digest)
    return ForeignAutoencoder(module, config).eval(), source


def _foreign_folder(path: str | Path) -> Path | None:
    """The folder whose config.json names a class that this library does not have."""
    if hub_id(path) is not None:
        return None
    for folder in (Path(path), Path(path) / "vae"):
        if (folder / CONFIG).is_file():
            name = read_config_values(folder / CONFIG).get("_class_name")
            return folder if isinstance(name, str) and name not in CONFIGS else None
    return None


def _load(folder: Path, values: dict[str, Any]) -> nn.Module:
    name = str(values["_class_name"])
    try:
        import diffusers
    except ImportError as error:
        message = f"{folder} holds a {name}, which needs diffusers; pip install 'latentae[diffusers]'"
        raise MissingDependencyError(message) from error
    loader: Any = getattr(diffusers, name, None)
    if not (isinstance(loader, type) and issubclass(loader, nn.Module)):
        raise ModelError(
            f"{folder} holds a {name}, which neither this library nor diffusers has as a model; give an "
            "autoencoder"
        )
    file = folder_weights(folder)
    words = file.name.split(".")[1:] if file else []
    known = ("safetensors", "bin", "index", "json")
    options = {
        "variant": next((word for word in words if word not in known), None),  # fp16 of x.fp16.bin
        "use_safetensors": "safetensors" in words if file else None,
        "torch_dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        module, info = loader.from_pretrained(folder, **options)  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"diffusers could not load the {name} in {folder} ({first_line(error)[:200]}); give a complete "
            "folder"
        ) from error
    for what in ("missing", "unexpected", "mismatched"):
        if keys := info[f"{what}_keys"]:
            found = some(list(map(str, keys)))
            raise ModelError(
                f"the weights in {folder} have {what} {found} for a {name}; give a matching config.json"
            )
    return module.eval().requires_grad_(False)


@torch.inference_mode()
def _config(module: Any, values: dict[str, Any], folder: Path) -> ForeignConfig:
    """The shape, by one image of zeros."""
    name = str(values["_class_name"])
    channels = int(values.get("in_channels", 3))
    weight = next(module.parameters())
    try:
        image = torch.zeros(1, channels, TRIAL, TRIAL, device=weight.device, dtype=weight.dtype)
        latent = _posterior(module, image).mode()
        restored = _image(module, latent.to(weight.dtype))
    except Exception as error:  # a model of videos, sound or proteins can fail in any way
        raise ModelError(
            f"the {name} in {folder} does not take images [B, {channels}, H, W] "
            f"({first_line(error)[:200]}); give an image autoencoder"
        ) from error
    if latent.ndim != 4 or restored.shape[-2:] != image.shape[-2:] or TRIAL % latent.shape[-1]:
        raise ModelError(
            f"the {name} in {folder} gives latents {tuple(latent.shape)} and images {tuple(restored.shape)} "
            f"for an image {tuple(image.shape)}; give an image autoencoder"
        )
    return ForeignConfig(
        kind=name,
        in_channels=channels,
        out_channels=restored.shape[1],
        latent_channels=latent.shape[1],
        factor=TRIAL // latent.shape[-1],
        sample_size=values.get("sample_size") or 256,
        scaling_factor=values.get("scaling_factor") or 1.0,
        shift_factor=values.get("shift_factor") or 0.0,
    )


def _posterior(module: Any, x: Tensor) -> DiagonalGaussian:
    encoded = module.encode(x)
    if not hasattr(encoded, "latent_dist"):
        names = ("latents", "latent")
        return DiagonalGaussian.of_mean(
            next(v for n in names if (v := getattr(encoded, n, None)) is not None)
        )
    found = encoded.latent_dist
    mean, logvar = found.mode(), getattr(found, "logvar", None)
    random = not getattr(found, "deterministic", False)
    if random and isinstance(logvar, Tensor) and logvar.shape == mean.shape:
        return DiagonalGaussian(torch.cat([mean, logvar], dim=1))
    return DiagonalGaussian.of_mean(mean)


def _image(module: Any, z: Tensor) -> Tensor:
    return module.decode(z).sample
