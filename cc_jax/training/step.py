"""One training step of CustomContrast as a pure function of its state.

Adapter and frozen base are flat dictionaries (`cc_jax.customcontrast.build`); a module exists only
inside `total_loss`, where its methods are called.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from cc_jax.customcontrast.param_groups import group_by_module
from cc_jax.models.params import Params
from cc_jax.parallel.mesh import batch_sharding, replicated_sharding
from cc_jax.parallel.rules import param_shardings, shards_params
from cc_jax.training import optimizer
from cc_jax.training.accumulation import accumulate_gradients
from cc_jax.training.losses import total_loss
from cc_jax.training.step_context import Batch, Metrics, StepContext


class TrainState(NamedTuple):
  """What a checkpoint holds. Trained weights, optimizer and EMA are sharded alike."""

  trainable: Params
  opt_state: Any
  ema: Params
  step: Int[Array, ""]  # finished steps = position in the data
  bad_steps: Int[Array, ""]  # skipped updates in a row, the latest included


def init_state(trainable: Params, config: ml_collections.ConfigDict) -> TrainState:
  """The state before the first step; the EMA starts as a copy of the weights."""
  return TrainState(
    trainable=trainable, opt_state=optimizer.make_optimizer(config.train).init(trainable),
    ema=jax.tree.map(jnp.copy, trainable), step=jnp.zeros((), jnp.int32),
    bad_steps=jnp.zeros((), jnp.int32),
  )


def train_step(
  context: StepContext, state: TrainState, frozen: Params, batch: Batch, seed: Int[Array, ""]
) -> tuple[TrainState, Metrics]:
  """One update. All randomness is fold_in(seed, step): a step is a function of its arguments."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  if context.config.train.grad_accum_steps > 1:
    (_, metrics), gradients = accumulate_gradients(context, state.trainable, frozen, batch, key)
  else:
    loss_fn = context.remat_all_gathers(functools.partial(total_loss, context))
    (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      state.trainable, frozen, batch, key
    )
  if context.mesh is not None and shards_params(context.mesh):
    # A reduce-scatter: each device gets the sum of its own shard only.
    shardings = param_shardings(gradients, context.mesh)
    gradients = jax.lax.with_sharding_constraint(gradients, shardings)
  return update(context.config.train, state, gradients, metrics)


def update(
  train: ml_collections.ConfigDict, state: TrainState, gradients: Params, metrics: Metrics
) -> tuple[TrainState, Metrics]:
  """The state after these gradients, and the metrics with norms, rate and bad steps added.

  A loss or gradient that is not finite changes nothing but the counters. The device decides that,
  so that the loop need not wait.
  """
  rate = optimizer.learning_rate(train, state.step)
  gradient_norm = optax.global_norm(gradients)
  directions, opt_state = optimizer.make_optimizer(train).update(
    gradients, state.opt_state, state.trainable
  )
  trainable, change = optimizer.apply_update(state.trainable, directions, rate, train)
  ema = optimizer.update_ema(state.ema, trainable, train.ema, state.step)

  good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(gradient_norm)
  kept = jax.tree.map(
    lambda new, old: jnp.where(good, new, old), (trainable, opt_state, ema),
    (state.trainable, state.opt_state, state.ema),
  )
  bad_steps = jnp.where(good, 0, state.bad_steps + 1)
  added = {
    "norm/gradient": gradient_norm,
    "norm/update": jnp.where(good, optax.global_norm(change), 0.0),
    "learning_rate": rate,
    "bad_steps": bad_steps,
  }
  for module, names in group_by_module(gradients).items():
    added[f"norm/gradient/{module}"] = optax.global_norm([gradients[name] for name in names])
    update_norm = optax.global_norm([change[name] for name in names])
    added[f"norm/update/{module}"] = jnp.where(good, update_norm, 0.0)
  return TrainState(*kept, state.step + 1, bad_steps), {**metrics, **added}


def make_train_step(
  context: StepContext, mesh: Mesh, state: TrainState, frozen: Params
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_step` jitted: step(state, frozen, batch, seed); the state is donated.

  `state` and `frozen` give shapes, and may be abstract; RULES shard them. Runs that differ in their
  seed alone compile the same program, and share it in JAX's compilation cache.
  """
  context = dataclasses.replace(context, mesh=mesh)
  of_state, of_frozen = param_shardings(state, mesh), param_shardings(frozen, mesh)
  return jax.jit(
    lambda state, frozen, batch, seed: train_step(context, state, frozen, batch, seed),
    in_shardings=(of_state, of_frozen, batch_sharding(mesh), replicated_sharding(mesh)),
    out_shardings=(of_state, replicated_sharding(mesh)), donate_argnums=0,
  )
