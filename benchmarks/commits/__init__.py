"""What `same_results.py` is made of: a commit that runs, its programs as text, and what two commits left behind."""
