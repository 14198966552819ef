"""Tasks with verifiers, and the small models that learn them."""
