"""Writes the features that the frozen VAE and image encoder give of a data set, once for many runs.

    python -m cc_jax.cache --config=configs/sd15.py --config.data.placements=4
    python -m cc_jax.train --config=configs/sd15.py --config.data.placements=4 \
      --config.data.cached=True --workdir=runs/sd15

They lie beside the data, or in data.cache_dir, and serve all runs with the same VAE, image encoder
and data settings, whatever their seed, objective or adapter. The same command again goes on where
the one before was stopped. On several machines the same command runs on each, as with
`cc_jax.train`; each encodes a part on its own devices. docs/scale.md says how large they are.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from cc_jax import cli
from cc_jax.cache.writer import write_features
from cc_jax.errors import UserError


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  batch = flags.FLAGS.batch_per_chip
  if batch < 1:
    raise UserError(f"--batch_per_chip={batch}; it must be at least 1")
  write_features(flags.FLAGS.config, batch_per_chip=batch)


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "configs/subjects3d.py")
  flags.DEFINE_integer("batch_per_chip", 16, "Pictures that a chip encodes at once.")


if __name__ == "__main__":
  cli.run(main, define_flags)
