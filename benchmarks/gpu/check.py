"""Whether JAX sees a GPU: exit code 0, or 1 with the reason in one line."""

import sys

import jax

if __name__ == "__main__":
  if "--tiny" not in sys.argv and jax.default_backend() != "gpu":
    sys.exit(f"JAX {jax.__version__} sees no GPU (only {jax.default_backend()}); install "
             "jax[cuda13] or jax[cuda12], or try --tiny")
