"""Training objectives: pure functions of arrays."""
