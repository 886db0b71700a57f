"""Text to text with a trained model, and its scores."""
