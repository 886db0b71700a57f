"""The optimiser, and the schedule of its learning rate."""
