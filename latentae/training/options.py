"""Options of a run that belong to no other room. Every schedule counts images seen, so a new batch size moves none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from latentae.options import KW_ONLY, PathLike, argument, option, table

__all__ = [
    "CorruptionOptions",
    "EmaOptions",
    "FailureOptions",
    "LogOptions",
    "ModelOptions",
    "OptimizerOptions",
]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class ModelOptions(BaseModel):
    """The autoencoder: a preset, with single values replaced."""

    model_config = _STRICT
    preset: str = Field(
        default="kl-f8",
        description="Shape: kl-f4, kl-f8, kl-f8-z16, kl-f16, kl-f16-z32, kl-f32, tiny, tiny-f8; dc-f8, dc-f16, dc-f32-z32, dc-f64-z128, "
        "dc-tiny; or linear. 'init' takes that of init_from.",
    )
    init_from: str | None = Field(
        default=None,
        description="Weights to begin with: a run, checkpoint, diffusers folder, or a safetensors or LDM file.",
    )
    init_discriminator: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="Whether init_from gives the discriminator too: if it has one that fits, always, or never.",
    )
    train: Literal["all", "decoder", "decoder-head", "encoder", "latent"] = Field(
        default="all",
        description="What is trained: all; the decoder or its last level only (the latent stays as it is); the encoder only; "
        "or the coarsest levels of both around the latent.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute residual blocks in the backward pass: less memory, about a third more time.",
    )
    latent_noise: float = Field(
        default=0.0,
        ge=0,
        description="Standard deviation of noise mixed into the latent, z' = (1 - t) z + t noise with t uniform (l-DeTok: 3).",
    )
    latent_mask: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Places of the latent are replaced by a learned vector, a share of up to this much of them "
        "(l-DeTok: 0.7; one image in eight is left whole).",
    )
    decoder_noise: float = Field(
        default=0.0,
        ge=0,
        description="tau of noise added to the latent, of standard deviation |N(0, tau^2)| for each image (RAE).",
    )
    nested_channels: int = Field(
        default=0,
        ge=0,
        description="Decode the first c' latent channels only, c' a random multiple of this for all images of a step (DC-AE 1.5).",
    )
    bottleneck: Literal["gaussian", "deterministic"] = Field(
        default="gaussian",
        description="A sampled posterior with a KL term; or a plain code, whose log-variance stays at -30.",
    )
    in_channels: int | None = Field(
        default=None, ge=1, description="Image channels instead of the preset's; 1 is gray."
    )
    patch: int | None = Field(
        default=None, ge=1, description="Side of a patch of the preset linear, in pixels."
    )
    tied: bool | None = Field(
        default=None, description="Whether the preset linear has one weight for both directions."
    )
    latent_channels: int | None = Field(
        default=None, ge=1, description="Channels of the latent instead of the preset's."
    )
    block_out_channels: tuple[int, ...] | None = Field(
        default=None, description="Channels of each level instead of the preset's."
    )
    layers_per_block: int | None = Field(
        default=None, ge=1, description="Residual blocks per level instead of the preset's."
    )
    norm_num_groups: int | None = Field(
        default=None, ge=1, description="Groups of every GroupNorm instead of the preset's."
    )
    initialization: Literal["torch", "linear", "pca"] = Field(
        default="torch",
        description="Weights at the start: PyTorch's own; a nearly linear codec (quicker when time is short); or, of an AutoencoderDC, "
        "PCA of the training images.",
    )
    initial_logvar: float = Field(
        default=0.0,
        le=20,
        ge=-30,
        description="Added to the posterior's log-variance at the start; -6 begins with little noise.",
    )


class CorruptionOptions(BaseModel):
    """What is done to images before the encoder sees them; the losses compare with the clean image."""

    model_config = _STRICT
    noise: tuple[float, float] = Field(
        default=(0.0, 0.0),
        description="Gaussian noise: smallest and largest standard deviation, on the scale of [-1, 1]; one for each image.",
    )
    blur: tuple[float, float] = Field(
        default=(0.0, 0.0), description="Gaussian blur: smallest and largest sigma in pixels."
    )
    mask: tuple[float, float] = Field(
        default=(0.0, 0.0), description="Smallest and largest share of patches that are hidden."
    )
    mask_patch: int = Field(default=8, ge=1, description="Side of a hidden patch in pixels.")
    mask_fill: Literal["zero", "learned"] = Field(
        default="learned", description="What hidden patches show: mid-gray, or a colour that is learned."
    )
    mask_loss: Literal["all", "hidden"] = Field(
        default="all", description="Which patches the losses on the image look at."
    )
    ramp_images: int = Field(
        default=0,
        ge=0,
        description="Images of the phase over which the corruption grows from nothing to what is given here.",
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("noise", "blur", "mask"):
            low, high = getattr(self, name)
            if not 0 <= low <= high or (name == "mask" and high >= 1):
                raise ValueError(
                    f"{name} is [{low:g}, {high:g}], expected 0 <= smallest <= largest{' < 1' * (name == 'mask')}"
                )
        if self.mask_loss == "hidden" and not self.mask[0]:
            raise ValueError(
                f"mask_loss is 'hidden', but mask is {list(self.mask)}: some patches must be hidden in each image"
            )
        return self


class OptimizerOptions(BaseModel):
    """Optimizers of both networks, and the learning rate over images seen."""

    model_config = _STRICT
    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="AdamW; or Muon for the weights of the autoencoder's hidden layers and AdamW for all else.",
    )
    muon_lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate of Muon's weights; lr when not given."
    )
    lr: float = Field(default=1e-4, gt=0, description="Peak learning rate of the autoencoder.")
    trunk_lr_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Learning rate of the autoencoder's weights outside of residual branches over lr, with AdamW. Below 1 it keeps a start "
        "at PCA from being shaken; 0 leaves them as they are.",
    )
    discriminator_lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate of the discriminator; lr when not given."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay of Adam's two moments.")
    discriminator_betas: tuple[float, float] = Field(
        default=(0.5, 0.9), description="The same for the discriminator."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of the autoencoder.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Gradient norm of each network is clipped to this; 0 clips nothing."
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    warmup_images: int = Field(
        default=0, ge=0, description="Images over which the learning rate rises linearly from 0."
    )
    final_lr_ratio: float = Field(
        default=0.01, ge=0, le=1, description="Learning rate at the last image over its peak (cosine)."
    )


class EmaOptions(BaseModel):
    """A moving average of the autoencoder's weights, in fp32; what evaluation and export use."""

    model_config = _STRICT
    half_life_images: int = Field(
        default=100_000,
        ge=0,
        description="Images after which a weight's share has halved; shorter at the start; 0 averages nothing.",
    )


class LogOptions(BaseModel):
    """What is written while training, and how often."""

    model_config = _STRICT
    metrics_every_images: int = Field(
        default=0, ge=0, description="Images between lines of metrics.jsonl; 0: 200 lines in all."
    )
    validation_every_images: int = Field(
        default=0, ge=0, description="Images between validations with a picture; 0: 10 in all."
    )
    validation_images: int = Field(default=64, ge=1, description="Held-out images per validation.")
    tensorboard: bool = Field(default=True, description="Also write TensorBoard events.")
    summary: bool = Field(
        default=True, description="Write summary.html at the end and at Ctrl-C (a few seconds)."
    )
    wandb: str | None = Field(
        default=None, description="Also log to this Weights & Biases project (needs the package wandb)."
    )


class FailureOptions(BaseModel):
    """What happens when a loss or gradient is not finite."""

    model_config = _STRICT
    max_skipped_in_a_row: int = Field(
        default=10,
        ge=1,
        description="Steps with a non-finite loss or gradient that are skipped before the run rolls back.",
    )
    max_rollbacks: int = Field(
        default=3, ge=0, description="Returns to the last checkpoint before the run stops."
    )


_RECIPE = "Name of a shipped recipe, or path of a .toml file."


@table
class TrainOptions:
    """Train an autoencoder. Run the same command again to resume."""

    recipe: Any = argument(_RECIPE)
    output: PathLike | None = argument(
        "Run folder; only a dry run does without.", default=None, name="output o"
    )
    _: KW_ONLY
    resume: PathLike = option(
        "auto (resume this run), never, or a run or checkpoint to continue in a new folder.", default="auto"
    )
    init_from: PathLike | None = option(
        "Initial weights: a run, checkpoint, diffusers folder, or safetensors or LDM file.", default=None
    )
    dry_run: bool = option(
        "Take a few real steps of every phase, print speed, memory and total time, write nothing.",
        default=False,
    )
    overrides: Mapping[str, Any] = option("Options of the recipe.", default={})


@table
class ConfigOptions:
    """Print a recipe with every option resolved, as TOML, and a summary of each phase."""

    recipe: Any = argument(_RECIPE)
    _: KW_ONLY
    overrides: Mapping[str, Any] = option("Options of the recipe.", default={})


@table
class InitOptions:
    """Write the PCA start of an AutoencoderDC as a model, without training."""

    recipe: Any = argument(_RECIPE)
    shards: PathLike = argument("Training shards, or a folder of images.")
    out: PathLike = argument("Folder to write.")
    _: KW_ONLY
    overrides: Mapping[str, Any] = option("Options of the recipe.", default={})
