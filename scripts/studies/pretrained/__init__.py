"""A language model that somebody trained, pruned and healed by its own whole self."""
