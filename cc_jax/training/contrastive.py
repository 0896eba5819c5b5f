"""CSCL and MACL over the embeddings of the global batch."""

from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int

from cc_jax.customcontrast.model import CustomContrast
from cc_jax.objectives.contrast import ContrastiveBackend
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.macl import macl
from cc_jax.training.inputs import positive_features
from cc_jax.training.step_context import Batch, Metrics, prefix_keys


class Embeddings(NamedTuple):
  """What the contrastive losses compare; None where neither needs it."""

  visual_cls: Float[Array, "b d"] | None = None
  textual_cls: Float[Array, "b d"] | None = None
  anchors: Float[Array, "l b q d"] | None = None  # textual tokens of the references
  positives: Float[Array, "l b q d"] | None = None
  embed: Float[Array, "b e"] | None = None


LAYERED = ("anchors", "positives")  # the batch is their second axis


def contrastive_embeddings(
  model: CustomContrast, objective: ml_collections.ConfigDict, batch: Batch,
  features: Float[Array, "b p c"], embed: Float[Array, "b e"], t: Int[Array, " b"],
) -> Embeddings:
  """Encodes references and positives as far as the contrastive losses need them, at the same t.

  CSCL: `same_frame` is the figure's reading; `cross_frame` [R] compares V of the reference with T
  of the positive, so that a pose that both share is no shortcut. S of MACL comes from the
  references, which are centred: it depends on the subjects and not on where they stand.
  """
  embeddings = Embeddings()
  if not (objective.lambda_cscl or objective.lambda_macl):
    return embeddings
  reference = model.encode(features, t)
  positive = None
  if objective.lambda_macl or objective.cscl_frame == "cross_frame":
    positive = model.encode(positive_features(model, batch), t)
  if objective.lambda_cscl:
    textual = reference if objective.cscl_frame == "same_frame" else positive
    embeddings = embeddings._replace(
      visual_cls=reference.visual_cls, textual_cls=textual.textual_cls
    )
  if objective.lambda_macl:
    embeddings = embeddings._replace(
      anchors=reference.textual_tokens, positives=positive.textual_tokens, embed=embed
    )
  return embeddings


def compare_embeddings(
  objective: ml_collections.ConfigDict, embeddings: Embeddings, subject_ids: Int[Array, " b"],
  backend: ContrastiveBackend,
) -> tuple[Float[Array, ""], Metrics]:
  """λ_cscl L_CSCL + λ_macl L_MACL over the global batch's embeddings."""
  total, metrics = jnp.zeros(()), {}
  if objective.lambda_cscl:
    value, more = cscl(
      embeddings.visual_cls, embeddings.textual_cls, temperature=objective.cscl_temperature,
      subject_ids=subject_ids, backend=backend,
    )
    total = total + objective.lambda_cscl * value
    metrics |= {"loss/cscl": value, **prefix_keys("cscl", more)}
  if objective.lambda_macl:
    value, more = macl(
      embeddings.anchors, embeddings.positives, embeddings.embed,
      temperature=objective.macl_temperature, scaling=objective.macl_scaling,
      soft_temperature=objective.macl_soft_temperature, symmetric=objective.macl_symmetric,
      pooling=objective.macl_pooling, subject_ids=subject_ids, backend=backend,
    )
    total = total + objective.lambda_macl * value
    metrics |= {"loss/macl": value, **prefix_keys("macl", more)}
  return total, metrics
