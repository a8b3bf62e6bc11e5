"""Images to latents and back, for use in other programs."""
