"""What would otherwise fail late, or train on a wrong number."""
