"""How easily a diffusion model can learn a latent space."""
