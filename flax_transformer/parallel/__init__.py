"""Devices: meshes, sharding, memory, and hardware that is only described."""
