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


class TextualFeatures(NamedTuple):
  """What the contrastive losses read of positives."""

  textual_cls: Float[Array, "b d"]
  textual_tokens: Float[Array, "g b q d"]  # behind the head, if there is one


class SubjectEncodings(NamedTuple):
  """The MFI-Encoder's answers for a batch, all at the samples' timesteps."""

  shown: MFIFeatures | None  # references for the diffusion loss, dropped ones as no image
  reference: MFIFeatures  # all of them
  positive: TextualFeatures | None  # None where no loss needs it
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
  group = group if shown else None
  reference, positive, no_image = _encode_rows(model, features, t, keep, group)
  kept = reference.where(keep, no_image) if shown else None
  return SubjectEncodings(kept, reference, positive, embed[:, 0])


def needs_positive(objective: ml_collections.ConfigDict) -> bool:
  """Whether a loss compares the reference with another frame of the subject."""
  cross_frame = objective.lambda_cscl and objective.cscl_frame == "cross_frame"
  return bool(objective.lambda_macl or cross_frame)


def _encode_rows(
  model: CustomContrast, features: Float[Array, "b n p c"], t: Int[Array, " b"],
  keep: Bool[Array, " b"], group: int | None,
) -> tuple[MFIFeatures, TextualFeatures | None, MFIFeatures | None]:
  """What the MFI-Encoder says of references, of positives (n = 2), and of no image.

  Without an image the answer depends on t alone, and of `group` neighbours those that drop theirs
  have the same t (`noise.share_timestep`): one row answers for all of them. group None: none does.
  The textual Q-Former reads all rows at once; the visual one, and what follows, no positives.
  """
  encoder, (size, sets) = model.mfi_encoder, features.shape[:2]
  group, asks = group or 1, group is not None
  # A group's rows: reference, positive, reference, positive, .., no image.
  rows = features.reshape(size // group, group * sets, *features.shape[2:])
  times = jnp.repeat(t, sets).reshape(size // group, group * sets)
  if asks:
    rows = jnp.concatenate([rows, jnp.zeros_like(rows[:, :1])], axis=1)
    drops = ~keep.reshape(-1, group)
    first = jnp.argmax(drops, axis=1)[:, None]  # 0 where none drops, and nothing reads the answer
    times = jnp.concatenate(
      [times, jnp.take_along_axis(t.reshape(-1, group), first, axis=1)], axis=1)

  def picked(axis, x, first, last, step=1, times=1):
    """Of every group's rows first, first + step, .. before last, each `times` times."""
    x = x.reshape(*x.shape[:axis], size // group, -1, *x.shape[axis + 1 :])
    x = jax.lax.slice_in_dim(x, first, last, step, axis=axis + 1)
    x = jnp.repeat(x, times, axis=axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  every = dict(first=0, last=rows.shape[1], step=sets)  # references and no image
  rows = rows.reshape(-1, *rows.shape[2:])
  cls, tokens = encoder.textual(rows, times.reshape(-1))
  encoded = encoder.combine(
    encoder.visual(picked(0, rows, **every)),
    (picked(0, cls, **every), picked(1, tokens, **every)))
  reference = encoded.map_batch(functools.partial(picked, first=0, last=group))
  positive = no_image = None
  if sets > 1:
    others = dict(first=1, last=group * sets, step=sets)
    tokens = encoder.compared(picked(1, tokens, **others))
    positive = TextualFeatures(picked(0, cls, **others), tokens)
  if asks:
    last = functools.partial(picked, first=group, last=group + 1, times=group)
    no_image = encoded.map_batch(last)
  return reference, positive, no_image
