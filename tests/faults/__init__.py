"""Faults and hostile input: a helper module for each kind of fault, and the tests that use them."""
