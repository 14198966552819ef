"""Studies of teachers with another tokenizer."""
