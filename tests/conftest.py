"""Before any test imports jax: the CPU, no network, and quiet libraries."""

import os

# An installed libtpu or CUDA must not slow the suite down; tests that need more devices start
# processes of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_GCE_CHECK"] = "true"  # TFDS would look for cloud storage at import
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TQDM_DISABLE", "1")
