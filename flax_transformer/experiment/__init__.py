"""A whole run: its text, its programs, how it begins or goes on, what it is judged by, and what it leaves behind."""
