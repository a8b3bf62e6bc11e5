"""How good a model is: metrics with stated conventions, baselines at the same budget, the report."""
