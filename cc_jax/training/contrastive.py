"""CSCL and MACL over the embeddings of a batch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int

from cc_jax.customcontrast.model import CustomContrast
from cc_jax.objectives.contrast import NAIVE_BACKEND, ContrastiveBackend
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.macl import macl
from cc_jax.training.context import Batch, Metrics, prefix_keys, to_unit_range


def contrastive_objective(
  model: CustomContrast,
  objective: ml_collections.ConfigDict,
  batch: Batch,
  features: Float[Array, "b p c"],
  embed: Float[Array, "b e"],
  t: Int[Array, " b"],
  backend: ContrastiveBackend = NAIVE_BACKEND,
) -> tuple[Float[Array, ""], Metrics]:
  """λ_cscl L_CSCL + λ_macl L_MACL; `features` and `embed` are the references'."""
  seen = contrastive_embeddings(model, objective, batch, features, embed, t)
  return compare_embeddings(objective, seen, batch["subject_id"], backend)


class Embeddings(NamedTuple):
  """What the contrastive losses compare; None where neither asks for it."""

  visual_cls: Float[Array, "b d"] | None = None
  textual_cls: Float[Array, "b d"] | None = None
  anchors: Float[Array, "l b q d"] | None = None  # textual tokens of the references
  positives: Float[Array, "l b q d"] | None = None
  embed: Float[Array, "b e"] | None = None


LAYERED = ("anchors", "positives")  # the batch is their second axis


def contrastive_embeddings(
  model: CustomContrast,
  objective: ml_collections.ConfigDict,
  batch: Batch,
  features: Float[Array, "b p c"],
  embed: Float[Array, "b e"],
  t: Int[Array, " b"],
) -> Embeddings:
  """Runs the encoder on what the contrastive losses need.

  Reference and positive of a sample get the same t. CSCL: `same_frame` is the figure's reading;
  `cross_frame` [R] holds V of the reference against T of the positive, which no pose they share can
  solve. S of MACL comes from the references, which are re-centred, so that S speaks of the
  subjects and not of where they stand.
  """
  seen = Embeddings()
  if not (objective.lambda_cscl or objective.lambda_macl):
    return seen
  reference = model.encode(features, t)
  positive = None
  if objective.lambda_macl or objective.cscl_frame == "cross_frame":
    positive = model.encode(model.image_features(to_unit_range(batch["positive"]))[0], t)
  if objective.lambda_cscl:
    textual = reference if objective.cscl_frame == "same_frame" else positive
    seen = seen._replace(visual_cls=reference.visual_cls, textual_cls=textual.textual_cls)
  if objective.lambda_macl:
    seen = seen._replace(
      anchors=reference.textual_tokens, positives=positive.textual_tokens, embed=embed
    )
  return seen


def compare_embeddings(
  objective: ml_collections.ConfigDict,
  seen: Embeddings,
  subject_ids: Int[Array, " b"],
  backend: ContrastiveBackend,
) -> tuple[Float[Array, ""], Metrics]:
  """λ_cscl L_CSCL + λ_macl L_MACL over the global batch's embeddings."""
  total, metrics = jnp.zeros(()), {}
  if objective.lambda_cscl:
    value, parts = cscl(
      seen.visual_cls,
      seen.textual_cls,
      temperature=objective.cscl_temperature,
      subject_ids=subject_ids,
      backend=backend,
    )
    total = total + objective.lambda_cscl * value
    metrics |= {"loss/cscl": value, **prefix_keys("cscl", parts)}
  if objective.lambda_macl:
    value, parts = macl(
      seen.anchors,
      seen.positives,
      seen.embed,
      temperature=objective.macl_temperature,
      scaling=objective.macl_scaling,
      soft_temperature=objective.macl_soft_temperature,
      symmetric=objective.macl_symmetric,
      pooling=objective.macl_pooling,
      subject_ids=subject_ids,
      backend=backend,
    )
    total = total + objective.lambda_macl * value
    metrics |= {"loss/macl": value, **prefix_keys("macl", parts)}
  return total, metrics
