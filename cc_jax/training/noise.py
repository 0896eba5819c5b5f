"""The randomness of a training step, sample by sample."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Int

from cc_jax.training.step_context import StepContext

SHARED_TIMESTEP = 8  # neighbours in the batch


class StepNoise(NamedTuple):
  """All randomness of a step, by sample: neither sharding nor microbatches change it."""

  t: Int[Array, " b"]  # timesteps
  keep_text: Bool[Array, " b"]
  keep_image: Bool[Array, " b"]
  keys: Array  # [B], of the VAE's posterior and the noise


def sample_step_noise(context: StepContext, key: Array, size: int) -> StepNoise:
  """The timesteps, dropped conditions and keys of `size` samples."""
  objective, steps = context.config.objective, context.schedule.num_train_timesteps
  of_t, of_dropout, of_noise = jax.random.split(key, 3)
  t = sample_timesteps(of_t, size, steps, objective.timestep_shift)
  keep_text, keep_image = keep_conditions(of_dropout, size, objective)
  t = share_timestep(t, keep_image)
  return StepNoise(t, keep_text, keep_image, jax.random.split(of_noise, size))


def share_timestep(t: Int[Array, " b"], keep_image: Bool[Array, " b"]) -> Int[Array, " b"]:
  """Gives those of SHARED_TIMESTEP neighbours that drop their image the first one's timestep. [R]

  What the MFI-Encoder says of no image depends on t alone: one answer then serves all of them
  (`encodings.encode_subjects`). Each sample's t is distributed as before.
  """
  group = math.gcd(len(t), SHARED_TIMESTEP)
  grouped, drops = t.reshape(-1, group), ~keep_image.reshape(-1, group)
  first = jnp.take_along_axis(grouped, jnp.argmax(drops, axis=1)[:, None], axis=1)
  return jnp.where(drops, first, grouped).reshape(-1)


def keep_conditions(
  key: Array, size: int, objective: ml_collections.ConfigDict
) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
  """(keep text, keep image) per sample: some lose the text, others the image, others both.

  IP-Adapter's published values are 5 % each.
  """
  u = jax.random.uniform(key, (size,))
  text, image, both = objective.drop_text, objective.drop_image, objective.drop_both
  drops_text, drops_image = u < text, (u >= text) & (u < text + image)
  drops_both = (u >= text + image) & (u < text + image + both)
  return ~(drops_text | drops_both), ~(drops_image | drops_both)


def sample_timesteps(key: Array, size: int, steps: int, shift: float) -> Int[Array, " b"]:
  """Uniform timesteps in [0, steps), moved towards noise: u -> shift u / (1 + (shift - 1) u).

  A shift of 1 keeps them uniform; more trains more where an image's colours and layout are decided.
  The map is that of SD3 (arXiv 2403.03206, section 5.3.2), here for training alone. [R]
  """
  u = jax.random.uniform(key, (size,))
  u = shift * u / (1 + (shift - 1) * u)
  return jnp.minimum((u * steps).astype(jnp.int32), steps - 1)
