"""Datasets, completions, rewards, and sampling from a model."""
