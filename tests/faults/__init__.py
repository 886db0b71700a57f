"""Faults of the world around a run, and what must survive them; one helper module for each kind of fault."""
