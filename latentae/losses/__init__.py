"""Losses on reconstructions and latents.

They return one value per image; `Objective` averages them.
"""
