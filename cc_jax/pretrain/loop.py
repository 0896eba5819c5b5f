"""The loop that pretraining's stages share: one loss, one batch function, AdamW, EMA, resume.

For networks that are trained once, from scratch, on one machine; `cc_jax.train` trains adapters.
Batches and the loss's keys are pure functions of (seed, step): a stage that is killed continues
from its last save and gives the same result.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from cc_jax.bases.weights import replacing
from cc_jax.errors import UserError
from cc_jax.models.params import flatten, path_name
from cc_jax.parallel.mesh import batch_sharding, replicated_sharding
from cc_jax.training.optimizer import update_ema

Tree = Any


class FitState(NamedTuple):
  """What is saved of a stage."""

  params: Tree
  opt_state: Tree
  ema: Tree
  step: jax.Array


def fit(
    name: str,
    loss_fn: Callable[[Tree, Tree, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict]],
    params: Tree,
    frozen: Tree,
    batch_fn: Callable[[np.random.Generator, int], Mapping[str, np.ndarray]],
    config,
    workdir: Path,
    seed: int,
    mesh: jax.sharding.Mesh,
    watch: Callable[[Tree, Tree], dict[str, float]] | None = None,
) -> Tree:
  """Minimises `loss_fn(params, frozen, batch, key) -> (loss, metrics)`; returns the EMA of params.

  Args:
    name: names the save `workdir/<name>.state.safetensors` and the log `workdir/<name>.jsonl`.
    batch_fn: `(rng, step) -> batch` of numpy arrays whose leading dimension is the global batch.
    config: steps, batch, learning_rate, warmup, beta2, weight_decay, clip_norm, ema, save_every.
    watch: `(ema, frozen) -> numbers` worth logging at every save.

  Raises:
    UserError: the loss is not finite, or the save belongs to other shapes.
  """
  # Not training.optimizer's recipe: the rate depends on Adam's count, falls to 1 % and not to 0,
  # and the decay goes by the number of axes.
  tx = optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
          optax.warmup_cosine_decay_schedule(
              0.0, config.learning_rate, config.warmup, max(config.steps, config.warmup + 1),
              0.01 * config.learning_rate),
          b2=config.beta2, weight_decay=config.weight_decay,
          mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)))
  ema = jax.tree.map(jnp.array, params)
  state = FitState(params, tx.init(params), ema, jnp.zeros((), jnp.int32))
  file = workdir / f"{name}.state.safetensors"
  if file.exists():
    state = _load(file, state)
  state, frozen = jax.device_put((state, frozen), replicated_sharding(mesh))

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: FitState, frozen, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, frozen, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, config.ema, state.step)
    return FitState(params, opt_state, ema, state.step + 1), dict(metrics, loss=loss)

  def load_batch(step: int):
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    return jax.device_put(batch_fn(rng, step), batch_sharding(mesh))

  first = int(state.step)
  with (workdir / f"{name}.jsonl").open("a") as log, ThreadPoolExecutor(1) as pool, tqdm(
      total=config.steps, initial=first, desc=name, unit="step", mininterval=2) as bar:
    upcoming = pool.submit(load_batch, first)
    recent: list[dict] = []
    since = time.time()
    for step in range(first, config.steps):
      batch = upcoming.result()
      upcoming = pool.submit(load_batch, step + 1)  # while the device works
      state, metrics = update(state, frozen, batch)
      recent.append(metrics)
      bar.update()
      save = (step + 1) % config.save_every == 0 or step + 1 == config.steps
      if len(recent) == 50 or save:
        means = {key: float(np.mean([m[key] for m in recent])) for key in metrics}
        if not np.isfinite(means["loss"]):
          raise UserError(f"{name}: the loss is {means['loss']} near step {step}; lower "
                          f"the learning rate and start again, {file} holds the last good state")
        means["samples_per_s"] = config.batch * len(recent) / (time.time() - since)
        bar.set_postfix({key: f"{value:.4g}" for key, value in means.items()})
        if save:
          _save(file, state)
          if watch is not None:
            means |= watch(state.ema, frozen)
        log.write(json.dumps(dict(step=step + 1, **means)) + "\n")
        log.flush()
        recent, since = [], time.time()
  return jax.tree.map(jnp.asarray, jax.device_get(state.ema))


def _save(file: Path, state: FitState) -> None:
  flat = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
  with replacing(file) as temporary:  # a kill leaves the earlier save intact
    save_file(flat, temporary)


def _load(file: Path, like: FitState) -> FitState:
  flat = load_file(file)

  def pick(path, leaf):
    name = path_name(path)
    shape = flat[name].shape if name in flat else "nothing"
    if shape != leaf.shape:
      raise UserError(f"{file} is of another model: {name} should be {leaf.shape}, found {shape}; "
                      "use another --workdir")
    return jnp.asarray(flat[name])

  return jax.tree_util.tree_map_with_path(pick, like)
