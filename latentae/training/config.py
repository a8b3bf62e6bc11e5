"""The verb `config`: a resolved recipe, and a summary of each phase in words."""

from __future__ import annotations

from latentae.options import recipe_verb
from latentae.training.options import ConfigOptions
from latentae.training.recipe import Recipe, load_recipe

__all__ = ["config", "describe_phases"]

_TRAINED = {
    "all": "encoder and decoder",
    "decoder": "decoder (the latent is unchanged)",
    "decoder-head": "last level of the decoder (the latent is unchanged)",
    "encoder": "encoder",
    "latent": "coarsest levels around the latent",
}


@recipe_verb(ConfigOptions)
def config(options: ConfigOptions) -> str:
    """The resolved recipe as TOML text, with a summary of each phase as comments at its head.

    A nested option is a nested mapping: `config("kl-f8", optimizer={"lr": 2e-4})`. The text is a
    valid recipe.

    Raises:
        RecipeError: see `load_recipe`.
    """
    resolved = load_recipe(options.recipe, options.overrides)
    head = "".join(f"# {line}\n" for line in describe_phases(resolved))
    return f"{head}\n{resolved.toml()}"


def describe_phases(recipe: Recipe) -> list[str]:
    """A few lines per phase: images, steps, trained parts, loss weights, learning rate."""
    lines = []
    for index, phase in enumerate(recipe.phase_recipes()):
        title = f'phase {index} "{phase.description}"' if recipe.phases else "one phase"
        steps = f"{-(-phase.images // phase.batch_size):,} steps of {phase.batch_size}"
        weights = ", ".join(f"{name} {weight}" for name, weight in phase.loss.effective_weights().items())
        lines += [
            f"{title}: {phase.images:,} images = {steps}, {phase.data.resolution} px",
            f"  trained: {_TRAINED[phase.model.train]}",
            f"  weights per image element: {weights}",
            f"  {_optimizer(phase)}",
        ]
        if phase.loss.adversarial.weight:
            start = phase.loss.adversarial.start_images
            seen = max(0, phase.images - start)
            lines.append(f"  discriminator: from image {start:,} on, so it sees {seen:,} images")
    return lines


def _optimizer(recipe: Recipe) -> str:
    o = recipe.optimizer
    muon = f"Muon, learning rate {o.muon_lr or o.lr:g}, and " if o.name == "muon" else ""
    warm = f"warm-up over {o.warmup_images:,} images, then " if o.warmup_images else ""
    schedule = "constant" if o.schedule == "constant" else f"cosine down to {o.lr * o.final_lr_ratio:g}"
    return f"{muon}AdamW, learning rate {o.lr:g}, {warm}{schedule}"
