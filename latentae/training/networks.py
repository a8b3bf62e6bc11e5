"""The networks that a recipe asks for, with the weights they start with."""

from __future__ import annotations

import torch
from torch import nn

from latentae.errors import ModelError
from latentae.losses.options import AdversarialOptions
from latentae.models.architectures import build
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.backbone import FrozenBackbone
from latentae.models.base import Autoencoder
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.discriminator import FeatureDiscriminator, PatchDiscriminator, UNetDiscriminator
from latentae.models.initial import load_discriminator, load_initial
from latentae.models.initialization import set_deterministic, set_initial_logvar, start_linear
from latentae.models.trainable import select_trainable
from latentae.progress import note
from latentae.training.recipe import Recipe

__all__ = ["build_autoencoder", "build_discriminator"]


def build_autoencoder(recipe: Recipe) -> Autoencoder:
    """The recipe's autoencoder with the weights that its seed gives or that it begins with; what is not trained is frozen.

    Raises:
        ModelError: `model.init_from` can't be read, or is of another shape.
    """
    torch.manual_seed(recipe.seed)
    model = build(recipe.autoencoder_config())
    if recipe.model.init_from is not None:
        _load(model, recipe.model.init_from, recipe.model.initial_logvar)
    elif isinstance(model, AutoencoderKL | AutoencoderDC):
        if recipe.model.initialization == "linear":  # a start at PCA needs images (training/head_start.py)
            start_linear(model)
        set_initial_logvar(model, recipe.model.initial_logvar)
    if recipe.model.bottleneck == "deterministic":
        set_deterministic(model)
    select_trainable(model, recipe.model.train)
    model.gradient_checkpointing = recipe.model.gradient_checkpointing
    return model


def _load(model: Autoencoder, path: str, logvar: float) -> None:
    """Copy weights; a posterior that they do not have begins at `logvar`."""
    state, expected = load_initial(path).state, model.state_dict()
    if isinstance(model, AutoencoderDC):
        set_initial_logvar(model, logvar)
        state = model.with_own_head(state)
    wrong = [
        key
        for key in {**expected, **state}
        if key not in state or key not in expected or state[key].shape != expected[key].shape
    ]
    if wrong:
        shapes = " and ".join(
            f"{tuple(s[wrong[0]].shape)} {where}" if wrong[0] in s else f"not {where}"
            for s, where in ((state, "there"), (expected, "in the recipe's"))
        )
        raise ModelError(
            f"{path} is of another shape than the recipe's model: {wrong[0]} is {shapes}; --model.preset init takes its shape"
        )
    model.load_state_dict(state)


def build_discriminator(recipe: Recipe) -> nn.Module | None:
    """The recipe's discriminator, or None where no adversarial term is asked for.

    Raises:
        ModelError: `model.init_discriminator` is "yes", but `model.init_from` has none that fits.
        WeightsError, MissingDependencyError: the weights of its frozen backbone can't be had.
    """
    options = recipe.loss.adversarial
    if not options.weight:
        return None
    torch.manual_seed(recipe.seed + 1)
    model = _discriminator(options, recipe.autoencoder_config().out_channels)
    if recipe.model.init_from is not None and recipe.model.init_discriminator != "no":
        state = load_initial(recipe.model.init_from).discriminator
        problem = "it holds no discriminator" if state is None else load_discriminator(model, state)
        if problem and recipe.model.init_discriminator == "yes":
            raise ModelError(
                f"{recipe.model.init_from}: {problem}; --model.init-discriminator no starts a new one"
            )
        if problem and state is not None:
            note(f"{recipe.model.init_from}: its discriminator is left out, a new one is trained: {problem}")
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _discriminator(options: AdversarialOptions, channels: int) -> nn.Module:
    if options.discriminator == "features":
        return FeatureDiscriminator(
            FrozenBackbone(options.backbone, options.backbone_weights), options.channels, options.norm
        )
    kind = UNetDiscriminator if options.discriminator == "unet" else PatchDiscriminator
    return kind(channels, options.channels, options.layers, options.norm)
