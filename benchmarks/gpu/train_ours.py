"""Our training step of an SD 1.5 adapter at 512 px, in bf16: batches of 4 and more, and a profile.

The program is that of `cc_jax.train` with configs/sd15.py: VAE and image encoder in the step.
"""

from __future__ import annotations

import argparse
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.profile_table import profile
from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import (
  RandomWeights,
  growing_batches,
  is_out_of_memory,
  peak_gib,
  training_config,
)
from benchmarks.train_step import noise
from cc_jax.parallel.mesh import make_mesh, shard_batch
from cc_jax.parallel.rules import shard_params
from cc_jax.plan import lower
from cc_jax.training.step import init_state

TOKENS = 77
ROUNDS, STEPS = 3, 4


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--first", type=int, default=4)
  parser.add_argument("--most", type=int, default=256)
  arguments = parser.parse_args()
  last, good = [()], []

  def fits(batch: int) -> bool:
    last[0] = ()  # its memory goes first
    gc.collect()
    try:
      last[0] = measure(batch, tiny=arguments.tiny)
    except Exception as error:
      if not is_out_of_memory(error):
        raise
      record("train", who="cc_jax", batch=batch, does_not_fit=True)
    if last[0]:
      good.append(batch)
    return bool(last[0])

  growing_batches(arguments.first, 4 if arguments.tiny else arguments.most, fits)
  if not last[0] and good:  # the last one tried did not fit
    fits(good[-1])
  if last[0]:
    *parts, batch = last[0]
    profile("train", f"a step of {batch} images", lambda: take_steps(*parts, steps=2))


def measure(batch: int, *, tiny: bool) -> tuple:
  """(compiled step, [state], other arguments, batch), after its times are written."""
  config = training_config(batch, tiny=tiny)
  mesh = make_mesh(config.mesh, batch)
  program = lower.train_program(config, mesh)
  state, frozen, _, _ = program.arguments
  began = time.perf_counter()
  compiled = program.function.lower(*program.arguments).compile()
  compile_seconds = time.perf_counter() - began
  weights = RandomWeights()
  trainable = jax.tree_util.tree_map_with_path(weights, state.trainable)
  state = [shard_params(init_state(trainable, config), mesh)]
  del trainable
  frozen = jax.tree_util.tree_map_with_path(weights, frozen)
  pictures = noise(batch, config.data.image_size, [[0] * TOKENS])
  pictures = {name: np.asarray(values, program.arguments[2][name].dtype)
              for name, values in pictures.items() if name in program.arguments[2]}
  rest = frozen, shard_batch(pictures, mesh), shard_params(np.uint32(0), mesh)
  metrics = take_steps(compiled, state, rest, steps=2)  # warm
  assert jnp.isfinite(metrics["loss"]), metrics["loss"]
  times = []
  for _ in range(ROUNDS):
    began = time.perf_counter()
    take_steps(compiled, state, rest, steps=STEPS)
    times.append((time.perf_counter() - began) / STEPS)
  seconds = float(np.median(times))
  record("train", who="cc_jax", batch=batch, seconds=seconds, images_a_second=batch / seconds,
         spread=float((max(times) - min(times)) / seconds), peak_gib=peak_gib(),
         compile_seconds=compile_seconds, loss=float(metrics["loss"]),
         attention=str(config.train.get("attention", "xla")))
  return compiled, state, rest, batch


def take_steps(compiled, state: list, rest: tuple, *, steps: int):
  """Metrics of the last step. The state is donated, so the list holds the newest."""
  for _ in range(steps):
    state[0], metrics = compiled(state[0], *rest)
  return jax.block_until_ready(metrics)


if __name__ == "__main__":
  main()
