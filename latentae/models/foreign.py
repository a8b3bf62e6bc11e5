"""Autoencoders of diffusers that are not this library's own, with its interface: what they are compared by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from latentae.errors import MissingDependencyError, ModelError, some
from latentae.files import sha256
from latentae.models.architectures import ARCHITECTURES
from latentae.models.base import Autoencoder
from latentae.models.config import AutoencoderConfig, read_config_values
from latentae.models.hub import hub_id
from latentae.models.posterior import DiagonalGaussian
from latentae.models.pretrained import CONFIG, ModelSource, folder_weights, load_model

__all__ = ["ForeignAutoencoder", "ForeignConfig", "load_any_model"]

TRIAL = 128  # side of the image that tells the downsampling; every class of diffusers takes it


class ForeignConfig(AutoencoderConfig):
    """What is known of a foreign model: found by encoding one image, not read from its config."""

    class_name = ""

    kind: str = Field(description="Its class in diffusers.")
    in_channels: int = Field(default=3, ge=1, description="Image channels in.")
    out_channels: int = Field(default=3, ge=1, description="Image channels out.")
    latent_channels: int = Field(default=4, ge=1, description="Channels of the latent, z.")
    factor: int = Field(default=8, ge=1, description="Image pixels per latent pixel along a side.")
    sample_size: int | tuple[int, ...] = Field(
        default=256, description="Image side in pixels the model was made for."
    )
    scaling_factor: float = Field(
        default=1.0, description="Latents are multiplied by it for a diffusion model."
    )
    shift_factor: float = Field(default=0.0, description="Subtracted from latents before scaling.")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""
        return self.factor


class ForeignAutoencoder(Autoencoder):
    """A model of diffusers with the interface of this library's, for inference alone.

    Its latent is what its `encode` gives: a posterior where it has one, else the latents as they are, with no spread. A quantised model
    (VQModel) gives the latents before quantisation, and its decoder quantises them.
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
    """`load_model`, and beyond it any image autoencoder in a diffusers folder, in evaluation mode.

    Raises:
        ModelError: see `load_model`; or a class that diffusers does not have, or that is no autoencoder of images.
        MissingDependencyError: the folder needs diffusers, which is not installed.
    """
    folder = _foreign_folder(path)
    if folder is None:
        return load_model(path, weights, device)
    values = read_config_values(folder / CONFIG)
    module = _load(folder, values).to(device)
    config = _config(module, values, folder)
    size = config.sample_size
    files = sorted(file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    digest = hashlib.sha256("".join(sha256(file) for file in (*files, folder / CONFIG)).encode()).hexdigest()
    resolution = size if isinstance(size, int) else min(size)
    source = ModelSource(
        Path(path), folder_weights(folder) or folder / CONFIG, config, "folder", resolution, digest
    )
    return ForeignAutoencoder(module, config).eval(), source


def _foreign_folder(path: str | Path) -> Path | None:
    """The folder with a config.json that names a class this library has not; None where there is none."""
    if hub_id(path) is not None:
        return None
    ours = {config.class_name for config in ARCHITECTURES}
    for folder in (Path(path), Path(path) / "vae"):
        if (folder / CONFIG).is_file():
            name = read_config_values(folder / CONFIG).get("_class_name")
            return folder if isinstance(name, str) and name not in ours else None
    return None


def _load(folder: Path, values: dict[str, Any]) -> nn.Module:
    name = str(values["_class_name"])
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError(
            f"{folder} holds a {name}, which needs diffusers; pip install diffusers"
        ) from error
    kind: Any = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelError(
            f"{folder} holds a {name}, which neither this library nor diffusers has as a model; give an autoencoder"
        )
    file = folder_weights(folder)
    words = file.name.split(".")[1:] if file else []
    variant = next(
        (word for word in words if word not in ("safetensors", "bin", "index", "json")), None
    )  # fp16 of x.fp16.bin
    options = {"variant": variant, "use_safetensors": "safetensors" in words if file else None}
    try:
        loader: Any = kind
        module, info = loader.from_pretrained(
            folder, **options, torch_dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"diffusers could not load the {name} in {folder} ({_line(error)}); give a whole folder"
        ) from error
    for what in ("missing", "unexpected", "mismatched"):
        if keys := info[f"{what}_keys"]:
            raise ModelError(
                f"the weights in {folder} have {what} {some(list(map(str, keys)))} for a {name}; give a matching config.json"
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
    except Exception as error:  # a model of videos, sound or proteins fails in any way it likes
        raise ModelError(
            f"the {name} in {folder} does not take images [B, {channels}, H, W] ({_line(error)}); give an image autoencoder"
        ) from error
    if latent.ndim != 4 or restored.shape[-2:] != image.shape[-2:] or TRIAL % latent.shape[-1]:
        raise ModelError(
            f"the {name} in {folder} makes latents {tuple(latent.shape)} and images {tuple(restored.shape)} of {tuple(image.shape)}; "
            "give an image autoencoder"
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
    made = module.encode(x)
    if hasattr(made, "latent_dist"):
        spread = made.latent_dist
        mean, logvar = spread.mode(), getattr(spread, "logvar", None)
        if (
            isinstance(logvar, Tensor)
            and logvar.shape == mean.shape
            and not getattr(spread, "deterministic", False)
        ):
            return DiagonalGaussian(torch.cat([mean, logvar], dim=1))
    else:
        mean = next(
            value
            for value in (getattr(made, name, None) for name in ("latents", "latent"))
            if value is not None
        )
    return DiagonalGaussian.of_mean(mean)


def _image(module: Any, z: Tensor) -> Tensor:
    return module.decode(z).sample


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
