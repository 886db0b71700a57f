"""State and batch to a better state."""
