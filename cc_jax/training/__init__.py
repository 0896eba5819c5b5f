"""Training: the loop, the step that runs on the devices, its state, log and checkpoints."""
