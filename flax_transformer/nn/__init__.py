"""Layers, written by hand on top of `ops`."""
