"""From the tensors of a file to the state dict of a model, under any of the names that files have.

Files name the same weights as diffusers does, as diffusers did until 2023, or as latent diffusion
(LDM) does, each with or without a prefix such as "first_stage_model.".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from latentae.errors import ModelError, some
from latentae.models.config import AutoencoderConfig, AutoencoderKLConfig
from latentae.models.ldm import infer_config, ldm_names, ldm_prefix, prefix_before
from latentae.progress import note

__all__ = ["fitting_state", "inferred_config"]

_DIFFUSERS_MARK = "encoder.mid_block.resnets.0.conv1.weight"
# names of attention layers in diffusers until 2023; its oldest VAE folders still have them
_DEPRECATED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# what a training leaves in the file of an autoencoder and no encoder or decoder reads
_TRAINING = (
    "loss.", "discriminator.", "model_ema.", "foundation_model.", "linear_proj.", "colorize", "n_averaged",
    "scale_factor",
)  # fmt: skip
# names that no other component has
_AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")
# tensors that show another family with these names, and what to do
_FAMILIES = (
    (
        r"^(bn\.|encoder\.quant_conv\.|decoder\.post_quant_conv\.)",
        "this is FLUX.2's layout, which is not read; `evaluate` reads its diffusers folder "
        "(AutoencoderKLFlux2)",
    ),
    (
        r"(^|\.)(time_stack|mix_factor|time_mix_conv)\b",
        "these are layers over time, of an autoencoder of videos; give one of images",
    ),
)


def fitting_state(model: Any, tensors: Mapping[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The tensors of `file` as a state dict of `model`, which may be on the meta device.

    An LDM file with an average of all weights of the autoencoder (`model_ema.*`, from LDM's
    `ema_decay`) gives the average. The average of a latent diffusion model covers only its denoiser
    and is ignored. The log names the tensors that are left out: those of a training and of other
    components.

    Raises:
        ModelError: a key, shape or type does not fit, or a tensor is unknown; the first ones are
            named.
    """
    expected = model.state_dict()
    with _naming(file):
        prefix = ldm_prefix(tensors) if isinstance(model.config, AutoencoderKLConfig) else None
        if prefix is None:
            tensors = _current(tensors)
            prefix = prefix_before(tensors, max(expected, key=len)) or ""
            names = {key: prefix + key for key in expected}
            source = names
        else:
            levels = len(model.config.block_out_channels)
            names = {key: prefix + name for key, name in ldm_names(expected, levels).items()}
            averages = {key: "model_ema." + name.replace(".", "") for key, name in names.items()}  # as LitEma
            source = averages if not prefix and tensors.keys() >= set(averages.values()) else names
        state = {
            key: _matrix(tensors[name], expected[key]) for key, name in source.items() if name in tensors
        }
        _check(model.config, expected, state, source)
        unknown, harmless = _split_unknown(tensors, {*names.values(), *source.values()}, prefix)
        if unknown:
            raise ModelError(f"it has unknown {some(unknown)}; {_advice(unknown, prefix)}")
    if source is not names:
        note(f"{file}: took the averaged weights (model_ema.*)")
    if harmless:
        note(f"{file}: left out {harmless}, which the autoencoder does not use")
    return state


def inferred_config(file: Path, tensors: Mapping[str, Tensor]) -> AutoencoderKLConfig:
    """The shape of the autoencoder in a file of weights without a config, from its tensors.

    Tensors do not tell the number of groups of a norm. It is 32 in LDM. Under diffusers' names 32
    is assumed and logged.

    Raises:
        ModelError: the tensors are not those of an autoencoder of this library.
    """
    with _naming(file):
        if ldm_prefix(tensors) is not None:
            return infer_config(tensors)
        current = _current(tensors)
        prefix = prefix_before(current, _DIFFUSERS_MARK)
        if prefix is None:
            raise ModelError(
                "no config.json is next to it, and its tensors are not those of an AutoencoderKL; put its "
                "config.json there"
            )
        current = {key.removeprefix(prefix): v for key, v in current.items() if key.startswith(prefix)}
        levels = 0
        while f"decoder.up_blocks.{levels}.resnets.0.conv1.weight" in current:
            levels += 1
        renamed = ldm_names(current, levels)
        config = infer_config({renamed[key]: value for key, value in current.items()})
    note(
        f"{file}: no config.json next to it; its shape was read from the tensors, norms taken to have "
        f"{config.norm_num_groups} groups"
    )
    return config


@contextmanager
def _naming(file: str | Path) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


def _current(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names of today."""
    return {_current_name(key): value for key, value in tensors.items()}


def _current_name(key: str) -> str:
    for old, new in _DEPRECATED.items():
        if "attentions" in key and old in key:
            return key.replace(old, new)
    return key


def _matrix(value: Tensor, expected: Tensor) -> Tensor:
    """A linear layer that is stored as a 1x1 convolution, as LDM does, becomes a matrix."""
    pointwise = expected.ndim == 2 and value.ndim > 2 and set(value.shape[2:]) == {1}
    return value.flatten(1) if pointwise else value


def _check(
    config: AutoencoderConfig,
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
) -> None:
    """Check that `state` has the keys and shapes of `expected`; `names` are the file's."""
    wrong = [key for key in state if state[key].shape != expected[key].shape]
    if wrong:
        latent = ("quant_conv", "post_quant_conv", "decoder.conv_in")
        key = next((key for key in wrong if key.startswith(latent)), wrong[0])
        z = config.latent_channels
        hint = f"; the config says latent_channels = {z}" if key.startswith(latent) else ""
        raise ModelError(
            f"{names[key]} has shape {tuple(state[key].shape)}, the model expects "
            f"{tuple(expected[key].shape)}{hint}"
        )
    missing = [names[key] for key in expected if key not in state]
    if missing:
        raise ModelError(f"it lacks {some(missing)}; the weights and config.json belong to different models")
    for key, value in state.items():
        if expected[key].is_floating_point() and not value.is_floating_point():
            raise ModelError(
                f"{key} has type {value.dtype}, expected floating point; give weights that are not quantized"
            )


def _split_unknown(keys: Iterable[str], used: Collection[str], prefix: str) -> tuple[list[str], str]:
    """The keys of a file that are an error, and in words those that may be left out.

    Harmless are the tensors of a training (`loss.*`, `model_ema.*`, ...), and other components if
    the autoencoder has a prefix.
    """
    left = [key for key in keys if key not in used]
    inside = [key for key in left if key.startswith(prefix)]
    unknown = [key for key in inside if not key.removeprefix(prefix).startswith(_TRAINING)]
    unknown += [key for key in left if not key.startswith(prefix) and key.startswith(_AUTOENCODER)]
    names = [key.removeprefix(prefix) for key in left if key not in set(unknown)]
    harmless = Counter(f"{name.split('.')[0]}.*" if "." in name else name for name in names)
    return unknown, some(
        [f"{name} ({count})" if count > 1 else name for name, count in harmless.most_common()]
    )


def _advice(unknown: list[str], prefix: str) -> str:
    for pattern, text in _FAMILIES:
        if any(re.search(pattern, key.removeprefix(prefix)) for key in unknown):
            return text
    return "the weights and config.json belong to different models"
