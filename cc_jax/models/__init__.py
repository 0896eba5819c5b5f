"""The networks others made, ported to Flax NNX; nothing of our method."""
