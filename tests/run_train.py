"""The training command on the tiny base, in a process of its own that tests may kill.

    python tests/run_train.py BASE WORKDIR [--config.key=value ...]

KILL=step:5 ends the process by SIGKILL once step 5 is logged; KILL=save:6 while the checkpoint of
step 6 is complete but for the rename that commits it. Batches come from tests/tiny.py.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: E402, F401  (the environment)
import tiny  # noqa: E402
from ml_collections import config_flags  # noqa: E402

import data_pipeline  # noqa: E402
from cc_jax import errors, telemetry, train  # noqa: E402

KILL, _, AT = os.environ.get("KILL", "").partition(":")


def loader(_, tokenizer, *, batch_size, seed, start_step=0, **kwargs):
  return tiny.batches(tokenizer, batch_size, seed=seed, start=start_step)


def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)


class Deadly(telemetry.Telemetry):
  def step(self, step, metrics):
    super().step(step, metrics)
    if KILL == "step" and step == int(AT):
      die()


def main(argv):
  data_pipeline.make_loader = loader
  train.Telemetry = Deadly
  if KILL == "save":
    from orbax.checkpoint._src.path import atomicity

    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def finalize_or_die(self, *args, **kwargs):
      if self.get_final().name == AT:
        die()
      return await finalize(self, *args, **kwargs)

    atomicity.AtomicRenameTemporaryPath.finalize = finalize_or_die
  train.train(_CONFIG.value, workdir)


if __name__ == "__main__":
  base, workdir = sys.argv[1:3]
  del sys.argv[1:3]
  _CONFIG = config_flags.DEFINE_config_dict("config", tiny.tiny_config(base))
  errors.run(main)
