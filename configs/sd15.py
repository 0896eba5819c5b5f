"""CustomContrast on Stable Diffusion 1.5, as in the paper.

  python -m cc_jax.train --config=configs/sd15.py --abstract

builds the whole training state abstractly (seconds, no weights) and prints the parameter table:
88.2 M trained parameters beside 1,698 M frozen ones.
Training downloads the weights that `base` and `encoder.image_encoder` name, 4.27 and 2.53 GB, says
so before it begins, and needs pictures of subjects (data_pipeline/sources/folder.py) and an
accelerator:

  python -m cc_jax.train --config=configs/sd15.py --workdir=runs/sd15 --config.data.name=my_subjects

The project has not trained it: neither weights nor photographs were available.

A slice for it: v5e:4x4, all weights and 4 images on every chip. The plan says 15.1 of its 16 GiB,
0.44 s per step (0.33 to 0.56), 145 images/s; on v6e:4x4 with 8 images per chip 27.1 of 32 GiB,
0.30 s, 433 images/s (docs/scale.md):

  python -m cc_jax.plan --config=configs/sd15.py --topology=v5e:4x4 --batch_per_chip=4
"""

import ml_collections

from configs import subjects3d


def get_config() -> ml_collections.ConfigDict:
  """The differences from configs/subjects3d.py, which explains all keys."""
  c = subjects3d.get_config()
  # Hub ids at one commit, so that a run means the same weights next year; or paths of folders.
  # The mirror of runwayml/stable-diffusion-v1-5, which its owner has taken down.
  c.base = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"

  c.data.source = "folder"
  c.data.name = "data/multi_view"
  c.data.image_size = 512
  c.data.holdout_subjects = 2  # of whom pictures are drawn; a large data set can spare more

  # The image encoder of IP-Adapter(-plus): CLIP ViT-H/14, 32 layers, 257 tokens of 1280.
  c.encoder.image_encoder = (
    "h94/IP-Adapter/models/image_encoder@018e402774aeeddd60609b4ecdb7e298259dc729"
  )
  c.encoder.image_layers = (8, 16, 24, 31)  # detail to meaning; 31 is IP-Adapter-plus' penultimate
  c.encoder.width = 768  # that of the text encoder, so that W'_k, W'_v start from W_k, W_v
  c.encoder.depth = 4
  c.encoder.heads = 12
  c.encoder.visual_queries = 16
  c.encoder.textual_queries = 16
  c.encoder.s_plus_pooled = "plain"  # SDXL: that of the unmodified prompt
  c.injection.location_width = 64

  # Weights and temperatures of CSCL and MACL are those of configs/subjects3d.py, where a weight of
  # 0.1 drowned the diffusion gradient. Both were never tried with the features of CLIP ViT-H.
  c.objective.timestep_shift = 1.0  # IP-Adapter's plain loss
  c.objective.subject_weight = 0.0

  c.train.batch_size = 64
  c.train.learning_rate = 1e-4  # IP-Adapter's, as are batch and weight decay
  c.train.steps = 100_000
  c.train.warmup_steps = 1_000
  c.train.schedule = "constant"
  c.train.beta2 = 0.999
  c.train.ema = 0.9999
  c.train.dtype = "bfloat16"
  c.train.base_dtype = "bfloat16"
  c.train.save_every = 2_000
  c.train.sample_every = 2_000
  c.train.prompt_sensitivity_every = 2_000

  c.sample.subjects = 8
  c.sample.steps = 30
  c.sample.guidance = 7.5
  c.sample.prompts = (
    "a {noun} on the beach", "a {noun} in the snow", "a {noun} on a bookshelf",
    "a watercolour painting of a {noun}",
  )  # fmt: skip
  return c
