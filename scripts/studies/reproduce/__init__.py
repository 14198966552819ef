"""What the literature claims, as experiments."""
