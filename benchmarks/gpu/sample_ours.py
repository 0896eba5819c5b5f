"""Our sampler of a plain base in bf16: 30 steps with guidance, 1 and 4 pictures a batch."""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu.record import record
from benchmarks.gpu.sizes import RandomWeights, architecture, is_out_of_memory, peak_gib
from cc_jax.bases.base import abstract_base
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.sampling.prompts import Prompts
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler

GUIDANCE, ROUNDS = 7.5, 3


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--base", choices=("sd15", "sdxl"), default="sd15")
  arguments = parser.parse_args()
  steps = 3 if arguments.tiny else 30
  folder, _ = architecture(arguments.base, tiny=arguments.tiny)
  base = abstract_base(folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  definition, shapes = nnx.split(bundle(base))
  params = jax.tree_util.tree_map_with_path(RandomWeights(), shapes)
  sampler = ImageSampler(
    nnx.merge(definition, params), NoiseSchedule.from_config(base.scheduler_config))
  for count in (1,) if arguments.tiny else (1, 4):
    try:
      measure(sampler, base, count, steps, arguments.base)
    except Exception as error:
      if not is_out_of_memory(error):
        raise
      record(f"sample-{arguments.base}", who="cc_jax", batch=count, does_not_fit=True)


def measure(sampler: ImageSampler, base, count: int, steps: int, name: str) -> None:
  lengths = [tower.config.max_position_embeddings for tower in base.text_encoders]
  prompts, negative = some_prompts(lengths, count, 320), some_prompts(lengths, 1, 0)
  noise = sampler.noise(range(count))

  def draw() -> float:
    began = time.perf_counter()
    sampler(prompts, negative, noise=noise, steps=steps, guidance=GUIDANCE)
    return time.perf_counter() - began

  first = draw()
  seconds = float(np.median([draw() for _ in range(ROUNDS)]))
  record(f"sample-{name}", who="cc_jax", batch=count, steps=steps, seconds=seconds,
         seconds_an_image=seconds / count, first_seconds=first, peak_gib=peak_gib())


def some_prompts(lengths, count: int, word: int) -> Prompts:
  """A few equal words between CLIP's begin and end tokens, for each text encoder."""
  ids = []
  for length in lengths:
    row = np.full((count, length), 49407, np.int32)
    row[:, 0], row[:, 1:6] = 49406, word or 49407
    ids.append(row)
  nothing = tuple(np.zeros(count, np.int32) for _ in lengths)
  return Prompts(tuple(ids), nothing, tuple(np.zeros((count, 2), np.int32) for _ in lengths))


if __name__ == "__main__":
  main()
