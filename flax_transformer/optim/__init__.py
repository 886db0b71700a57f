"""How parameters change: the optimiser, and the schedule of its learning rate."""
