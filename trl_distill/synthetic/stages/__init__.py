"""The stages of the data engine."""
