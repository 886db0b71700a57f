"""Text to batches of ids; NumPy alone, no JAX."""
