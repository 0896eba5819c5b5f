"""AdamW with warm-up, clipping and an average of the weights, as functions of plain pytrees."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from cc_jax.customcontrast.param_groups import param_options
from cc_jax.errors import UserError
from cc_jax.models.params import Params

SCHEDULES = ("cosine", "constant")


def learning_rate(train: ml_collections.ConfigDict, step: Int[Array, ""]) -> Float[Array, ""]:
  """The rate of update number `step` (from 0): linear warm-up, then a cosine to 0 or constant.

  A function of the data position, not of Adam's own count: a skipped update does not delay it.
  """
  step = jnp.asarray(step, jnp.float32)
  warm = jnp.minimum((step + 1) / max(train.warmup_steps, 1), 1.0)
  rate = train.learning_rate * warm
  if train.schedule == "constant":
    return rate
  if train.schedule != "cosine":
    raise UserError(f"unknown train.schedule {train.schedule!r}; we have {', '.join(SCHEDULES)}")
  length = max(train.steps - train.warmup_steps, 1)
  progress = jnp.clip((step - train.warmup_steps) / length, 0.0, 1.0)
  return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def make_optimizer(train: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Clipping by the global norm, Adam, decoupled decay (arXiv 1711.05101); the rate comes later.

  Its updates are directions: `apply` multiplies them by -rate.
  """
  return optax.chain(
    optax.clip_by_global_norm(train.clip_norm) if train.clip_norm > 0 else optax.identity(),
    optax.scale_by_adam(train.beta1, train.beta2, eps=1e-8),
    optax.add_decayed_weights(train.weight_decay, mask=decay_mask),
  )


def decay_mask(params: Params) -> dict[str, bool]:
  """Which parameters weight decay pulls to zero: not biases, norms' scales, gates and scalars."""
  return {
    path: value.ndim >= 2 and param_options(path.split(".")).decay for path, value in params.items()
  }


def apply_update(
  params: Params, directions: Params, rate: Float[Array, ""], train: ml_collections.ConfigDict
) -> tuple[Params, Params]:
  """(params - rate * directions, the change itself); some have a multiple of the rate.

  The multiple is the value of a key of `train`, which `param_options` names.
  """

  def changed(path: str, direction: Array) -> Array:
    key = param_options(path.split(".")).rate
    return -(rate * train[key] if key else rate) * direction

  change = {path: changed(path, direction) for path, direction in directions.items()}
  return optax.apply_updates(params, change), change


def update_ema(average: Any, params: Any, decay: float, step: Int[Array, ""]) -> Any:
  """decay * average + (1 - decay) * params, with the decay held at (1 + n) / (10 + n) at first.

  Without the cap an average over 1 / (1 - decay) steps remembers the random start of a short run.
  """
  step = jnp.asarray(step, jnp.float32)
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
