"""Models: what is read off them, loading, and the forwards that are added."""
