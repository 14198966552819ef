"""The data engine: how fast it is, and how evenly it keeps an endpoint busy."""
