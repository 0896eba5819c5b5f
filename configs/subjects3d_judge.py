"""The judge of subjects3d: classifies the factors of a picture, to score generated ones.

  python -m cc_jax.pretrain --config=configs/subjects3d_judge.py --workdir=runs/judge

On 2 of 4 cores without accelerator, other jobs on the rest: rendering 5 minutes, training 50. The
shipped judge was initialised (`init_from`) from one that had 6,000 steps on 110,000 pictures of the
3,520 subjects as they are. On 2,000 fresh renders of test subjects: class 99.2 %, scene 100, main
colour 97.9, visible pattern 92.9, azimuth within one of 8 bins 96.2 on classes with a front.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The table of decisions of `python -m cc_jax.pretrain --config=configs/subjects3d_judge.py`."""
  c = ml_collections.ConfigDict()
  c.seed = 7_000  # other pictures than the base and its encoders are trained on
  c.stages = ("judge",)

  c.world = ml_collections.ConfigDict()
  c.world.images = 250_000
  c.world.calm_ratio = 0.1
  c.world.plain_ratio = 0.0
  c.world.recombine = True  # shuffles the patterns and proportions of the 3,520 subjects
  c.world.split = "train"
  c.world.processes = 0  # 0 = one per core

  c.judge = ml_collections.ConfigDict()
  c.judge.width = 32
  c.judge.init_from = ""  # a judge's file whose weights the training goes on from; '' = random
  c.judge.test_images = 2000  # new pictures of test subjects that measure its accuracy
  c.judge.train = ml_collections.ConfigDict(dict(
      steps=7000, batch=64, learning_rate=1.5e-3, ema=0.995, warmup=200, beta2=0.99,
      weight_decay=0.05, clip_norm=1.0, save_every=1000))

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1
  c.mesh.cpu_devices = -1
  return c
