"""Autoencoders, their posterior, the discriminator, and loading and saving them."""
