"""Sweeps without an account: what is drawn, run and reported."""
