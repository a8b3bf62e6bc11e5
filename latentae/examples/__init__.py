"""The quickstart, and a small diffusion model on latents."""
