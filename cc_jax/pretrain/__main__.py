"""Trains the mini base (VAE, CLIP pair, UNet) or the judge on rendered pictures, from scratch.

  python -m cc_jax.pretrain --config=configs/subjects3d_base.py --workdir=runs/base

Stages run in the order of `config.stages`; a stage that is complete in the workdir is skipped, an
interrupted one continues from its last save. The result is `workdir/base`, a folder in the
diffusers layout, and the same in float16, `workdir/subjects3d-base`. A user of CustomContrast needs
none of this: the base ships with the package.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from cc_jax import cli
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.parallel.mesh import make_mesh
from cc_jax.pretrain.batches import train_tokenizer
from cc_jax.pretrain.clip import train_clip
from cc_jax.pretrain.config_checks import check_pretrain_config
from cc_jax.pretrain.judge import train_judge
from cc_jax.pretrain.unet import train_unet
from cc_jax.pretrain.vae import train_vae
from data_pipeline.subjects3d.prerender import prerender

STAGES: dict[str, Callable] = dict(
    tokenizer=train_tokenizer, vae=train_vae, clip=train_clip, unet=train_unet, judge=train_judge)


def main(argv: Sequence[str]) -> None:
  """Command line entry: runs the stages of --config in --workdir."""
  del argv
  config = flags.FLAGS.config
  check_pretrain_config(config)
  set_cpu_devices(config.mesh, _common_batch(config))
  run(config, Path(flags.FLAGS.workdir))


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Runs the stages of `config.stages` in `workdir`. Raises UserError for a bad config."""
  check_pretrain_config(config)
  world = config.world
  mesh = make_mesh(config.mesh, _common_batch(config))
  pictures = prerender(
      workdir / "world", world.images, seed=config.seed, split=world.split,
      calm_ratio=world.calm_ratio, plain_ratio=world.plain_ratio,
      recombine=world.recombine, processes=world.processes or None)
  for stage in config.stages:
    done = workdir / f"{stage}.done"
    if done.exists():
      print(f"{stage}: done before, skipped")
      continue
    STAGES[stage](config, workdir, pictures, mesh)
    done.touch()


def _common_batch(config: ml_collections.ConfigDict) -> int:
  """What divides every stage's batch: all stages share one mesh."""
  return math.gcd(*(section.train.batch for section in config.values()
                    if isinstance(section, ml_collections.ConfigDict) and "train" in section))


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "configs/subjects3d_base.py")
  flags.DEFINE_string("workdir", "runs/base", "Folder of the states and of the result.")


if __name__ == "__main__":
  cli.run(main, define_flags)
