"""Images to latents and back, for other people's programs."""
