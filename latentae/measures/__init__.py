"""Measures of images and latents: metrics, distances, statistics of latents."""
