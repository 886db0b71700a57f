"""Search over a decode step; knows no model and no text."""
