"""Layers by hand."""
