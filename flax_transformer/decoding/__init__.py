"""Search over a decode step. This package knows no model and no text."""
