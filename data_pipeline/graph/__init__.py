"""Triples made by TensorFlow operations: `loader.batches`; see docs/graph_input.md."""
