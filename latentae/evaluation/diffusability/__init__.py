"""How easily a diffusion model can learn a latent space: an aid to rank models that reconstruct about equally well."""
