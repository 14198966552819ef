"""Models: loading, their properties, and the forward passes that are added to them."""
