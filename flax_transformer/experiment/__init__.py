"""A whole run: its text and programs, its start or resumption, its validation, and its report."""
