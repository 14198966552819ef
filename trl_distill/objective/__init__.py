"""The objective, as pure functions on tensors."""
