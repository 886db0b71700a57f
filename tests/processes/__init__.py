"""Commands that several processes run together."""
