"""Input pipelines and the rendered world; imports nothing of cc_jax."""
