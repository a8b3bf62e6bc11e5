"""Options of `train`, `config` and `init`, and tables of a recipe.

Schedules count images seen, so they do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from latentae.models.presets import preset_names
from latentae.options import KW_ONLY, PathLike, RecipeTable, argument, option, table

__all__ = [
    "ConfigOptions",
    "CorruptionOptions",
    "EmaOptions",
    "FailureOptions",
    "InitOptions",
    "LogOptions",
    "ModelOptions",
    "OptimizerOptions",
    "TrainOptions",
]


class ModelOptions(RecipeTable):
    """The autoencoder: a preset, single values that replace the preset's, and how it is trained."""

    preset: str = option(
        f"Shape: {', '.join(preset_names())}; 'init' takes the shape of init_from.", default="kl-f8"
    )
    init_from: str | None = option(
        "Initial weights: a run, checkpoint, diffusers folder, or a safetensors or LDM file.", default=None
    )
    init_discriminator: Literal["auto", "yes", "no"] = option(
        "Whether to load the discriminator from init_from; 'auto' loads it if there is one that fits.",
        default="auto",
    )
    train: Literal["all", "decoder", "decoder-head", "encoder", "latent"] = option(
        "Trained part: all; the decoder or its last level (the latent is unchanged); the encoder; or the "
        "coarsest levels of both, around the latent.",
        default="all",
    )
    gradient_checkpointing: bool = option(
        "Recompute residual blocks in the backward pass: less memory, about a third more time.",
        default=False,
    )
    latent_noise: float = option(
        "Standard deviation of noise mixed into the latent, (1 - t) z + t noise, t uniform (l-DeTok: 3).",
        default=0.0,
        ge=0,
    )
    latent_mask: float = option(
        "Largest share of latent positions replaced by a learned vector (l-DeTok: 0.7).",
        default=0.0,
        ge=0,
        le=1,
    )
    decoder_noise: float = option(
        "tau of noise added to the latent; its standard deviation is |N(0, tau^2)| per image (RAE).",
        default=0.0,
        ge=0,
    )
    nested_channels: int = option(
        "Decode only the first c' latent channels, a random multiple of this per step (DC-AE 1.5).",
        default=0,
        ge=0,
    )
    bottleneck: Literal["gaussian", "deterministic"] = option(
        "A sampled posterior with a KL term; or a plain code, whose log-variance stays at -30.",
        default="gaussian",
    )
    in_channels: int | None = option("Image channels instead of the preset's; 1 is gray.", default=None, ge=1)
    patch: int | None = option("Patch side of preset 'linear' in pixels.", default=None, ge=1)
    tied: bool | None = option("Whether preset 'linear' shares one weight in both directions.", default=None)
    latent_channels: int | None = option("Latent channels instead of the preset's.", default=None, ge=1)
    block_out_channels: tuple[int, ...] | None = option(
        "Channels of each level instead of the preset's.", default=None
    )
    layers_per_block: int | None = option(
        "Residual blocks per level instead of the preset's.", default=None, ge=1
    )
    norm_num_groups: int | None = option(
        "Groups of every GroupNorm instead of the preset's.", default=None, ge=1
    )
    initialization: Literal["torch", "linear", "pca"] = option(
        "Initial weights: PyTorch's; a nearly linear codec, for short runs; or PCA of the training images "
        "(AutoencoderDC only).",
        default="torch",
    )
    initial_logvar: float = option(
        "Added to the posterior's initial log-variance; -6 starts with little noise.",
        default=0.0,
        le=20,
        ge=-30,
    )


class CorruptionOptions(RecipeTable):
    """Corruption of the encoder's input; the losses compare with the clean image."""

    noise: tuple[float, float] = option(
        "Smallest and largest standard deviation of Gaussian noise, for images in [-1, 1].",
        default=(0.0, 0.0),
    )
    blur: tuple[float, float] = option(
        "Smallest and largest sigma of Gaussian blur in pixels.", default=(0.0, 0.0)
    )
    mask: tuple[float, float] = option(
        "Smallest and largest share of patches that are hidden.", default=(0.0, 0.0)
    )
    mask_patch: int = option("Side of a hidden patch in pixels.", default=8, ge=1)
    mask_fill: Literal["zero", "learned"] = option(
        "Color of hidden patches: mid-gray or learned.", default="learned"
    )
    mask_loss: Literal["all", "hidden"] = option("Patches that the image losses compare.", default="all")
    ramp_images: int = option(
        "Images of the phase over which the corruption grows from zero to full strength.", default=0, ge=0
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("noise", "blur", "mask"):
            low, high = getattr(self, name)
            if not 0 <= low <= high or (name == "mask" and high >= 1):
                expected = f"0 <= smallest <= largest{' < 1' * (name == 'mask')}"
                raise ValueError(f"{name} is [{low:g}, {high:g}], expected {expected}")
        if self.mask_loss == "hidden" and not self.mask[0]:
            raise ValueError(
                f"mask_loss is 'hidden', but mask is {list(self.mask)}; the smallest share must be above 0"
            )
        return self


class OptimizerOptions(RecipeTable):
    """Optimizers of autoencoder and discriminator, and the learning rate over images seen."""

    name: Literal["adamw", "muon"] = option(
        "AdamW; or Muon for the weights of the autoencoder's hidden layers and AdamW for all others.",
        default="adamw",
    )
    muon_lr: float | None = option("Peak learning rate of Muon; defaults to lr.", default=None, gt=0)
    lr: float = option("Peak learning rate of the autoencoder.", default=1e-4, gt=0)
    trunk_lr_ratio: float = option(
        "Learning rate over lr of the autoencoder's weights outside residual branches, with AdamW. "
        "Values below 1 preserve a start at PCA; 0 freezes them.",
        default=1.0,
        ge=0,
        le=1,
    )
    discriminator_lr: float | None = option(
        "Peak learning rate of the discriminator; defaults to lr.", default=None, gt=0
    )
    betas: tuple[float, float] = option("Decay of Adam's two moments.", default=(0.9, 0.95))
    discriminator_betas: tuple[float, float] = option(
        "Decay of the two moments for the discriminator.", default=(0.5, 0.9)
    )
    weight_decay: float = option("Decoupled weight decay of the autoencoder.", default=0.0, ge=0)
    max_grad_norm: float = option(
        "Largest gradient norm of each network, by clipping; 0 clips nothing.", default=1.0, ge=0
    )
    schedule: Literal["cosine", "constant"] = option("Learning rate after the warm-up.", default="cosine")
    warmup_images: int = option("Images over which the learning rate rises linearly from 0.", default=0, ge=0)
    final_lr_ratio: float = option(
        "Last learning rate over its peak, for 'cosine'.", default=0.01, ge=0, le=1
    )


class EmaOptions(RecipeTable):
    """The moving average of the autoencoder's weights in fp32, which evaluation and export use."""

    half_life_images: int = option(
        "Images after which a weight's share has halved, shorter at the start; 0 averages nothing.",
        default=100_000,
        ge=0,
    )


class LogOptions(RecipeTable):
    """Logs of a run and how often they are written."""

    metrics_every_images: int = option(
        "Images between lines of metrics.jsonl; 0 writes 200 lines in all.", default=0, ge=0
    )
    validation_every_images: int = option(
        "Images between validations with a picture; 0 runs 10 in all.", default=0, ge=0
    )
    validation_images: int = option("Held-out images per validation.", default=64, ge=1)
    tensorboard: bool = option("Also write TensorBoard events.", default=True)
    summary: bool = option("Write summary.html at the end and at Ctrl-C (a few seconds).", default=True)
    wandb: str | None = option(
        "Also log to this Weights & Biases project (needs the package wandb).", default=None
    )


class FailureOptions(RecipeTable):
    """Handling of losses or gradients that are not finite."""

    max_skipped_in_a_row: int = option(
        "Steps in a row skipped for a non-finite loss or gradient before a rollback.", default=10, ge=1
    )
    max_rollbacks: int = option("Returns to the last checkpoint before the run stops.", default=3, ge=0)


_RECIPE = "Name of a shipped recipe, or path of a .toml file."
_OVERRIDES = "Options of the recipe."


@table
class TrainOptions:
    """Train an autoencoder. Run the same command again to resume."""

    recipe: Any = argument(_RECIPE)
    output: PathLike | None = argument("Run folder; optional for a dry run.", default=None, name="output o")
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
    overrides: Mapping[str, Any] = option(_OVERRIDES, default={})


@table
class ConfigOptions:
    """Print a recipe with every option resolved, as TOML. Comments sum up each phase."""

    recipe: Any = argument(_RECIPE)
    _: KW_ONLY
    overrides: Mapping[str, Any] = option(_OVERRIDES, default={})


@table
class InitOptions:
    """Write the PCA start of an AutoencoderDC as a model. Nothing is trained."""

    recipe: Any = argument(_RECIPE)
    shards: PathLike = argument("Training shards, or a folder of images.")
    out: PathLike = argument("Folder to write.")
    _: KW_ONLY
    overrides: Mapping[str, Any] = option(_OVERRIDES, default={})
