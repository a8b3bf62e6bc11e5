"""Ways to make an image small and large again, each at a stated budget: the model, and what it must beat."""
