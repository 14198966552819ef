"""On-policy distillation in miniature."""
