"""Sweeps without an account: draw points, run them one after another, report."""
