"""What a recipe amounts to, in words: the images of each phase, what is trained, and the weight of every loss."""

from __future__ import annotations

from latentae.options import recipe_verb
from latentae.training.options import ConfigOptions
from latentae.training.recipe import Recipe, load_recipe

__all__ = ["config", "describe_phases", "describe_weights"]

_TRAINED = {
    "all": "encoder and decoder",
    "decoder": "decoder (the latent stays as it is)",
    "decoder-head": "last level of the decoder (the latent stays as it is)",
    "encoder": "encoder",
    "latent": "coarsest levels around the latent",
}


def describe_weights(recipe: Recipe) -> str:
    """Every active loss with its effective weight, per image element."""
    return ", ".join(f"{name} {weight}" for name, weight in recipe.loss.effective_weights().items())


def describe_phases(recipe: Recipe) -> list[str]:
    """A few lines a phase: images, steps, sizes, what is trained, when the discriminator plays, weights."""
    phases = recipe.phase_recipes()
    lines = []
    for index, phase in enumerate(phases):
        title = f'phase {index} "{phase.description}"' if recipe.phases else "one phase"
        steps = -(-phase.images // phase.batch_size)
        lines.append(
            f"{title}: {phase.images:,} images = {steps:,} steps of {phase.batch_size}, {phase.data.resolution} px"
        )
        lines.append(f"  trained: {_TRAINED[phase.model.train]}")
        lines.append(f"  weights per image element: {describe_weights(phase)}")
        lines.append(f"  {_optimizer(phase)}, {_schedule(phase)}")
        adversarial = phase.loss.adversarial
        if adversarial.weight:
            playing = max(0, phase.images - adversarial.start_images)
            lines.append(
                f"  discriminator: from image {adversarial.start_images:,} on, so it sees {playing:,} images"
            )
    return lines


def _optimizer(recipe: Recipe) -> str:
    o = recipe.optimizer
    muon = f"Muon, learning rate {o.muon_lr or o.lr:g}, and " if o.name == "muon" else ""
    return f"{muon}AdamW, learning rate {o.lr:g}"


def _schedule(recipe: Recipe) -> str:
    o = recipe.optimizer
    warm = f"warm-up over {o.warmup_images:,} images, then " if o.warmup_images else ""
    return warm + ("constant" if o.schedule == "constant" else f"cosine down to {o.lr * o.final_lr_ratio:g}")


@recipe_verb(ConfigOptions)
def config(options: ConfigOptions) -> str:
    """The resolved recipe as TOML text, with what it amounts to as comments at its head.

    A nested option is a nested mapping: `config("kl-f8", optimizer={"lr": 2e-4})`. The text is a recipe itself.

    Raises:
        RecipeError: see `load_recipe`.
    """
    resolved = load_recipe(options.recipe, options.overrides)
    head = "".join(f"# {line}\n" for line in describe_phases(resolved))
    return f"{head}\n{resolved.toml()}"
