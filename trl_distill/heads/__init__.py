"""From hidden states to divergences and log-probabilities, without a (B, T, V) tensor."""
