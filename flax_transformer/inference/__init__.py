"""Translation of text with a trained model, and scores of translations."""
