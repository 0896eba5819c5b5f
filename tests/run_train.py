"""The training command on the tiny base, in a process of its own that tests may kill.

    python tests/run_train.py BASE WORKDIR [--config.key=value ...]

KILL says what happens to it: step:5 is SIGKILL once step 5 is logged, save:6 SIGKILL while the
checkpoint of step 6 is complete but for the rename that commits it; term:5 and termsave:6 are
SIGTERM in the same places; or at the next such place, if the run begins behind this one: how far a
run gets while it stops depends on the machine. After SIGTERM at a step each further one takes SLOW
seconds longer.
SHARDS is a folder for what lies on each device of each batch; FLOAT64 is for comparing numbers.
THEN is a second workdir, in which the same process trains when it is done with the first.
Batches come from tests/tiny.py.
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: E402, F401  (the environment)

if os.environ.get("FLOAT64"):
  import in_float64  # noqa: F401

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from ml_collections import config_flags  # noqa: E402

import data_pipeline  # noqa: E402
from cc_jax import cli  # noqa: E402
from cc_jax.training import loop, telemetry  # noqa: E402

KILL, _, AT = os.environ.get("KILL", "").partition(":")
SLOW = float(os.environ.get("SLOW", "0"))
SHARDS = os.environ.get("SHARDS", "")


def loader(_, tokenizer, *, batch_size, seed, rows, start_step=0, **kwargs):
  for batch in tiny.batches(tokenizer, batch_size, seed=seed, start=start_step):
    yield {key: value[list(rows)] for key, value in batch.items()}


@functools.cache  # one SIGTERM is enough
def die(how=signal.SIGKILL):
  os.kill(os.getpid(), how)


class Deadly(telemetry.Telemetry):
  def step(self, step, metrics):
    super().step(step, metrics)
    if KILL == "step" and step >= int(AT):
      die()
    if KILL == "term" and step >= int(AT):
      die(signal.SIGTERM)
      time.sleep(SLOW)


def shards_are_kept(folder):
  put, count = loop.shard_batch, iter(range(10**6))

  def shard_batch(batch, mesh):
    arrays, number = put(batch, mesh), next(count)
    shards = {
      f"{key}/{shard.index[0].start or 0}": np.asarray(shard.data)
      for key, array in arrays.items()
      for shard in array.addressable_shards
    }
    np.savez(Path(folder) / f"{number}.{jax.process_index()}.npz", **shards)
    return arrays

  loop.shard_batch = shard_batch


def main(argv):
  data_pipeline.make_loader = loader
  loop.Telemetry, put = Deadly, loop.shard_batch
  if SHARDS:
    shards_are_kept(SHARDS)
  if KILL in ("save", "termsave"):
    from orbax.checkpoint._src.path import atomicity

    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def finalize_or_die(self, *args, **kwargs):
      name = self.get_final().name
      if name.isdigit() and int(name) >= int(AT):
        die(signal.SIGKILL if KILL == "save" else signal.SIGTERM)
      return await finalize(self, *args, **kwargs)

    atomicity.AtomicRenameTemporaryPath.finalize = finalize_or_die
  loop.train(_CONFIG.value, workdir)
  if os.environ.get("THEN"):
    loop.shard_batch = put
    loop.train(_CONFIG.value, os.environ["THEN"])


if __name__ == "__main__":
  base, workdir = sys.argv[1:3]
  del sys.argv[1:3]
  _CONFIG = config_flags.DEFINE_config_dict("config", tiny.tiny_config(base))
  cli.run(main)
