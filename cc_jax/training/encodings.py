"""What a step asks the image encoder and the MFI-Encoder: each is asked once.

Two uses of a weight would be two gradients, each reduced over the devices by itself.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Int

from cc_jax.customcontrast.mfi_encoder import MFIFeatures
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.training.inputs import image_features
from cc_jax.training.noise import SHARED_TIMESTEP, StepNoise
from cc_jax.training.step_context import Batch, StepContext


class SubjectEncodings(NamedTuple):
  """The MFI-Encoder's answers for a batch, all at the samples' timesteps."""

  shown: MFIFeatures | None  # references for the diffusion loss, dropped ones as no image
  reference: MFIFeatures  # all of them
  positive: MFIFeatures | None  # None where no loss needs it
  embed: Float[Array, "b e"]  # of the references, by the image encoder


def encode_subjects(
  context: StepContext, model: CustomContrast, batch: Batch, step_noise: StepNoise, *,
  shown: bool = True, microbatch: bool = False,
) -> SubjectEncodings:
  """Encodes references, and positives as far as the contrastive losses need them.

  Args:
    shown: False leaves `shown` out, for who needs the contrastive losses alone.
    microbatch: the batch is part of a step's: neighbours in it need not share a timestep.
  """
  objective = context.config.objective
  names = ("reference", "positive") if needs_positive(objective) else ("reference",)
  features, embed = image_features(model, batch, names)
  t, keep = step_noise.t, step_noise.keep_image
  if not (objective.lambda_cscl or objective.lambda_macl):
    encoded = model.encode(features[:, 0], t, keep)
    return SubjectEncodings(encoded, encoded, None, embed[:, 0])
  group = 1 if microbatch else math.gcd(context.rows_per_device(len(t)), SHARED_TIMESTEP)
  *encoded, no_image = _encode_sets(model, features, t, keep, group if shown else None)
  return SubjectEncodings(
    encoded[0].where(keep, no_image) if shown else None, encoded[0],
    encoded[1] if len(names) > 1 else None, embed[:, 0],
  )


def needs_positive(objective: ml_collections.ConfigDict) -> bool:
  """Whether a loss compares the reference with another frame of the subject."""
  cross_frame = objective.lambda_cscl and objective.cscl_frame == "cross_frame"
  return bool(objective.lambda_macl or cross_frame)


def _encode_sets(
  model: CustomContrast, features: Float[Array, "b n p c"], t: Int[Array, " b"],
  keep: Bool[Array, " b"], group: int | None,
) -> list[MFIFeatures | None]:
  """The MFI-Encoder's answer for each of the n sets, and for no image; all in one batch.

  Without an image the answer depends on t alone, and of `group` neighbours those that drop theirs
  have the same t (`noise.share_timestep`): one row answers for all of them. group None: none does.
  """
  size, sets = features.shape[:2]
  group, asks = group or 1, group is not None
  rows = features.reshape(size // group, group * sets, *features.shape[2:])
  times = jnp.repeat(t, sets).reshape(size // group, group * sets)
  if asks:
    rows = jnp.concatenate([rows, jnp.zeros_like(rows[:, :1])], axis=1)
    drops = ~keep.reshape(-1, group)
    first = jnp.argmax(drops, axis=1)[:, None]  # 0 where none drops, and nothing reads the answer
    times = jnp.concatenate(
      [times, jnp.take_along_axis(t.reshape(-1, group), first, axis=1)], axis=1)
  encoded = model.encode(rows.reshape(-1, *rows.shape[2:]), times.reshape(-1))

  def picked(axis, x, first, last, times=1):
    """Of every group rows first, first + sets, .. before last, each `times` times: [.., B, ..]."""
    x = x.reshape(*x.shape[:axis], *rows.shape[:2], *x.shape[axis + 1 :])
    x = jax.lax.slice_in_dim(x, first, last, sets, axis=axis + 1)
    x = jnp.repeat(x, times, axis=axis + 1)
    return x.reshape(*x.shape[:axis], size, *x.shape[axis + 2 :])

  answers = [
    encoded.map_batch(functools.partial(picked, first=number, last=group * sets))
    for number in range(sets)
  ]
  no_image = functools.partial(picked, first=group * sets, last=group * sets + 1, times=group)
  return [*answers, encoded.map_batch(no_image) if asks else None]
