"""A whole run: its text, its programs, its start, its validation and its report."""
