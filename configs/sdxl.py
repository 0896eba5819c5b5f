r"""CustomContrast on Stable Diffusion XL base 1.0 (1024 px).

  python -m cc_jax.train --config=configs/sdxl.py --abstract

builds the whole training state abstractly and prints the parameter table. Not trained yet, for the
reason that configs/sd15.py gives.

A slice for it: v5e:8x8 with weights and Adam sharded over 8 chips, one image on each. The plan says
9.4 of a chip's 16 GiB, 0.65 s per step (0.49 to 0.92), 99 images/s (docs/scale.md):

  python -m cc_jax.plan --config=configs/sdxl.py --topology=v5e:8x8 --batch_per_chip=1 \
    --config.mesh.fsdp=8
"""

import ml_collections

from configs import sd15


def get_config() -> ml_collections.ConfigDict:
  """The differences from configs/sd15.py."""
  c = sd15.get_config()
  c.base = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"
  c.data.image_size = 1024

  # The resampler of IP-Adapter-plus for SDXL is as wide; W'_k, W'_v start at random, since the text
  # is 2048 wide.
  c.encoder.width = 1280
  c.encoder.heads = 20
  # 70 cross-attentions: the blocks of one transformer share an S+ (down 2 x 2 and 2 x 10, mid 10,
  # up 3 x 10 and 3 x 2), 11 sequences through the text encoders instead of 70. [R]
  c.encoder.layer_groups = (2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2)

  # At 1024 px the activations of one image would fill a chip of 16 GB.
  c.train.remat_unet = ("full",)
  c.train.remat_text = "full"

  c.sample.guidance = 5.0
  return c
