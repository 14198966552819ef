"""From hidden states to divergences, without a (B, T, V) tensor."""
