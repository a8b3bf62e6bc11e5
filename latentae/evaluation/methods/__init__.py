"""Methods that compress and restore images at a stated budget: other models and baselines."""
