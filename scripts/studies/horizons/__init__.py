"""Horizons: how much of the later divergence a token answers for, and what that does to a student."""
