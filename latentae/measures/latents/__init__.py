"""Measures of a latent space, and of how encoder and decoder behave around it."""
