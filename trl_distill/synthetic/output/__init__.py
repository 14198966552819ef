"""What the data engine writes."""
