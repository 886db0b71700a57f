"""Conversion of other systems' model files to run folders and back."""
