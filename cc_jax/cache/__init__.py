"""Frozen features written beside the data: `python -m cc_jax.cache`."""
