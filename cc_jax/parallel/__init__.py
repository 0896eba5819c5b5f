"""Devices: processes, the mesh, and how arrays are sharded over it."""
