"""ml_collections configs; each docstring has the command, the hardware, the time and the result."""
