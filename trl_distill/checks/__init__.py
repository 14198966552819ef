"""Checks before the first step, of what would otherwise fail late or silently train on something wrong."""
