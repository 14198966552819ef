"""What is logged, drawn and evaluated."""
