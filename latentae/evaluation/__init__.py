"""Verbs that measure models: metrics, baselines at the same budget, and reports."""
