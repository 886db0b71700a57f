"""The configuration of a run: its sections, its YAML form, and the flags of the command line."""
