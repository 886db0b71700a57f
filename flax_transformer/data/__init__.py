"""Text to batches of token ids, with NumPy and without JAX."""
