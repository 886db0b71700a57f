"""The configuration of a run: what it says, how it is read from YAML, how the command line changes it."""
