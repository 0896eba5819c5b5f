"""Gradient accumulation whose contrastive losses still see the whole batch (GradCache)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cc_jax.models.params import Params
from cc_jax.training.contrastive import (
  LAYERED,
  Embeddings,
  compare_embeddings,
  contrastive_embeddings,
)
from cc_jax.training.encodings import encode_subjects
from cc_jax.training.losses import diffusion_objective
from cc_jax.training.noise import sample_step_noise
from cc_jax.training.step_context import Batch, Metrics, StepContext


def accumulate_gradients(
  context: StepContext, trainable: Params, frozen: Params, batch: Batch, key: Array
) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
  """`total_loss` and its gradient, with the activations of one of grad_accum_steps microbatches.

  The contrastive losses still compare the whole batch (GradCache, arXiv 2101.06983): first the
  embeddings of all microbatches, without residuals; then the gradient of these losses with respect
  to the embeddings; then each microbatch again, with that gradient given.
  """
  objective, count = context.config.objective, context.config.train.grad_accum_steps
  size = batch["target_mask"].shape[0]
  microbatches = split_microbatches((dict(batch), sample_step_noise(context, key, size)), count)

  def embed_microbatch(trainable, microbatch, shown=True):
    """(model, what the diffusion loss is shown of the references, embeddings) of a microbatch."""
    model = context.model_for_gradient(trainable, frozen)
    subjects = encode_subjects(context, model, *microbatch, microbatch=True, shown=shown)
    return model, subjects.shown, contrastive_embeddings(objective, subjects)

  def compare(embeddings):
    merged = merge_microbatches(embeddings)
    return compare_embeddings(objective, merged, batch["subject_id"], context.contrast)

  def microbatch_loss(trainable, microbatch, d_embeddings):
    model, shown, embeddings = embed_microbatch(trainable, microbatch)
    loss, metrics = diffusion_objective(context, model, microbatch[0], shown, microbatch[1])
    # The gradient of these products is that of the contrastive losses through the embeddings.
    pairs = zip(jax.tree.leaves(d_embeddings), jax.tree.leaves(embeddings))
    products = [jnp.sum(d.astype(jnp.float32) * e) for d, e in pairs]
    return loss / count + sum(products), metrics

  def add(gradients, inputs):
    gradient_fn = jax.grad(context.remat_all_gathers(microbatch_loss), has_aux=True)
    more, metrics = gradient_fn(trainable, *inputs)
    return jax.tree.map(jnp.add, gradients, more), metrics

  _, embeddings = jax.lax.scan(
    lambda _, microbatch: (None, embed_microbatch(trainable, microbatch, shown=False)[2]), None,
    microbatches,
  )
  (contrast, more), d_embeddings = jax.value_and_grad(compare, has_aux=True)(embeddings)
  zeros = jax.tree.map(jnp.zeros_like, trainable)
  gradients, metrics = jax.lax.scan(add, zeros, (microbatches, d_embeddings))
  metrics = {name: values.mean() for name, values in metrics.items()}
  total = metrics["loss/diffusion"] + contrast
  return (total, {"loss": total, **metrics, **more}), gradients


def split_microbatches(tree: Any, count: int) -> Any:
  """Arrays [N, ...] -> [count, N / count, ...]; microbatch m has the samples m, m + count, ...

  So each device splits its own shard of the batch, and nothing moves between devices.
  """
  return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), tree)


def merge_microbatches(stacked: Embeddings) -> Embeddings:
  """Embeddings stacked by a scan over the microbatches -> those of the whole batch."""

  def merge(x, axis):  # [count, ..., N / count, ...]
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  return Embeddings(
    *(x if x is None else merge(x, int(name in LAYERED)) for name, x in stacked._asdict().items())
  )
