"""Studies: the demo, the benchmark, and the claims of the field as experiments."""
