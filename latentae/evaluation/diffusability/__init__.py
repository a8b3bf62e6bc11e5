"""How easily a diffusion model could learn a latent space: a ranking aid for models that reconstruct about equally well."""

from latentae.evaluation.diffusability.diffusing import DiffusabilityResult, diffusability

__all__ = ["DiffusabilityResult", "diffusability"]
