"""Gradient accumulation whose contrastive losses still see the whole batch (GradCache)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cc_jax.models.params import Params
from cc_jax.training.context import Batch, Metrics, StepContext, to_unit_range
from cc_jax.training.contrastive import (
  LAYERED,
  Embeddings,
  compare_embeddings,
  contrastive_embeddings,
)
from cc_jax.training.losses import diffusion_objective
from cc_jax.training.noise import sample_step_noise


def accumulate_gradients(
  method: StepContext, trainable: Params, frozen: Params, batch: Batch, key: Array
) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
  """`loss` and its gradient with the memory of a train.accumulate-th part of the batch.

  The contrastive losses see the whole batch all the same: their N does not shrink. First the
  embeddings of all parts, without what a gradient would have to keep; then the losses' gradient
  with respect to them; then each part again, whose own gradient takes these as given
  (GradCache, arXiv 2101.06983).
  """
  objective, count = method.config.objective, method.config.train.accumulate
  size = batch["target"].shape[0]
  chunks = split_microbatches((dict(batch), sample_step_noise(method, key, size)), count)

  def look(trainable, chunk):
    """(model, features, embeddings) of a part."""
    batch, draws = chunk
    model = method.learning_model(trainable, frozen)
    features, embed = model.image_features(to_unit_range(batch["reference"]))
    return model, features, contrastive_embeddings(model, objective, batch, features, embed, draws.t)

  def compare(seen):
    return compare_embeddings(objective, merge_microbatches(seen), batch["subject_id"], method.contrast)

  def part(trainable, chunk, d_seen):
    model, features, seen = look(trainable, chunk)
    total, metrics = diffusion_objective(method, model, chunk[0], features, chunk[1])
    # Its gradient is that of the contrastive losses, through this part's embeddings.
    inner = jax.tree.map(lambda d, s: jnp.sum(d.astype(jnp.float32) * s), d_seen, seen)
    return total / count + sum(jax.tree.leaves(inner)), metrics

  def add(gradients, inputs):
    gradient = jax.grad(method.remat_all_gathers(part), has_aux=True)
    more, metrics = gradient(trainable, *inputs)
    return jax.tree.map(jnp.add, gradients, more), metrics

  _, seen = jax.lax.scan(lambda _, chunk: (None, look(trainable, chunk)[2]), None, chunks)
  (contrast, parts), d_seen = jax.value_and_grad(compare, has_aux=True)(seen)
  gradients, metrics = jax.lax.scan(
    add, jax.tree.map(jnp.zeros_like, trainable), (chunks, d_seen)
  )
  metrics = {name: values.mean() for name, values in metrics.items()}
  total = metrics["loss/diffusion"] + contrast
  return (total, {"loss": total, **metrics, **parts}), gradients


def split_microbatches(tree: Any, count: int) -> Any:
  """Arrays [N, ...] -> [count, N / count, ...]; part m holds the samples m, m + count, ...

  So every device's share of the batch is cut by itself, and nothing moves between them.
  """
  return jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree
  )


def merge_microbatches(parts: Embeddings) -> Embeddings:
  """Stacked embeddings of the parts that `cut` made -> those of the whole batch."""

  def whole(x, axis):  # [count, ..., N / count, ...]
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  return Embeddings(
    *(x if x is None else whole(x, int(name in LAYERED)) for name, x in parts._asdict().items())
  )
