"""Recipes, the training step, the loop around it, checkpoints and logs."""
