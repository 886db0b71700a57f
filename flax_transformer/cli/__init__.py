"""One file a verb, each thin."""
