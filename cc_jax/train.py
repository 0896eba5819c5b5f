"""Trains a CustomContrast adapter on a frozen base.

    python -m cc_jax.train --config=configs/subjects3d.py --workdir=runs/first
    python -m cc_jax.train --config=... --workdir=... --config.train.steps=3000
    python -m cc_jax.train --config=configs/sd15.py --abstract

The same command again resumes the run, on any number of devices and processes. `--abstract` prints
the parameter table and ends; it needs no weights. On several machines the same command runs on each
(cc_jax.parallel.distributed). The training itself is cc_jax.training.loop.train.
"""

import re
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import config_flags

from cc_jax import cli
from cc_jax.errors import UserError
from cc_jax.evaluate import check_drawing, draw_validation_grid, score_test_subjects
from cc_jax.training.loop import Callbacks, train
from cc_jax.training.parameter_table import parameter_table
from cc_jax.training.setup import use_compilation_cache


def parse_steps(text: str) -> tuple[int, int]:
  """'10:15' -> (10, 15); '' -> (0, 0). Raises UserError for anything else."""
  match = re.fullmatch(r"(\d+):(\d+)", text or "0:0")
  if not match or int(match[1]) > int(match[2]):
    raise UserError(f"--profile_steps={text}: give the first and last step, e.g. 10:15")
  return int(match[1]), int(match[2])


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
  if flags.FLAGS.abstract:
    print(parameter_table(config))
    return
  if not workdir:
    raise UserError("no --workdir given; name a folder for checkpoints and logs")
  profile_steps = parse_steps(flags.FLAGS.profile_steps)
  use_compilation_cache(epath.Path(workdir))
  callbacks = Callbacks(
    on_start=check_drawing, on_sample=draw_validation_grid, on_finish=score_test_subjects)
  train(config, workdir, callbacks, profile_steps)


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "configs/subjects3d.py")
  flags.DEFINE_string("workdir", "", "Folder of checkpoints, logs and the adapter.")
  flags.DEFINE_string("profile_steps", "", "FIRST:LAST step of a trace in the workdir.")
  flags.DEFINE_bool("abstract", False, "Print the parameter table and end; needs no weights.")


if __name__ == "__main__":
  cli.run(main, define_flags)
