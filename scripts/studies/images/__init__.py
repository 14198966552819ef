"""Distillation with images in miniature: a task, two small models, and a run."""
