"""Tiles of the matrix of pairs, R rows by K columns, and the statistics accumulated over them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cc_jax.objectives.infonce import l2_normalize
from cc_jax.objectives.pair_scaling import PairLoss, clipped

# Stands for minus infinity, whose difference with itself would be NaN.
LOWEST = -1e30


class Samples(NamedTuple):
  """What M samples have besides their features."""

  index: Int[Array, " m"]  # in the global batch
  subject_id: Int[Array, " m"] | None
  unit_embed: Float[Array, "m e"] | None  # unit vectors whose products are S
  target_sum: Float[Array, " m"] | None = None  # normalises a row of soft targets

  @classmethod
  def create(cls, pair_loss: PairLoss, n: int, embed, subject_ids, target_sum=None) -> "Samples":
    """The N samples of the global batch."""
    unit = l2_normalize(lax.stop_gradient(embed)) if pair_loss.needs_similarity else None
    target_sum = target_sum if pair_loss.soft else None
    return cls(jnp.arange(n, dtype=jnp.int32), subject_ids, unit, target_sum)


class Tile(NamedTuple):
  """The pairs of R rows with K columns."""

  cosines: Float[Array, "r k"]
  similarity: Float[Array, "r k"] | None
  is_positive: Bool[Array, "r k"]
  allowed: Bool[Array, "r k"]

  @classmethod
  def create(cls, pair_loss: PairLoss, a, rows: Samples, b, columns: Samples, new) -> "Tile":
    """Pairs of unit features a [R, D] and b [K, D]; columns that are not `new` are masked out."""
    is_positive = (rows.index[:, None] == columns.index) & new
    allowed = jnp.broadcast_to(new, is_positive.shape)
    if rows.subject_id is not None:  # see infonce.allowed_pairs
      same = (rows.subject_id[:, None] == columns.subject_id) & (rows.subject_id >= 0)[:, None]
      allowed = new & (is_positive | ~same)
    similarity = None
    if pair_loss.needs_similarity:
      similarity = clipped(product("re,ke->rk", rows.unit_embed, columns.unit_embed))
    return cls(product("rd,kd->rk", a, b), similarity, is_positive, allowed)


class Stats(NamedTuple):
  """Running statistics of M rows, or M columns, that give their loss and accuracy."""

  max_logit: Float[Array, " m"]
  sum_exp: Float[Array, " m"]  # Σ exp(logit - max_logit)
  target_logit: Float[Array, " m"]  # Σ target * logit
  target_sum: Float[Array, " m"]  # Σ target
  hardest_negative: Float[Array, " m"]  # largest cosine of a negative

  @property
  def log_normaliser(self) -> Float[Array, " m"]:
    return self.max_logit + jnp.log(self.sum_exp)

  @property
  def loss(self) -> Float[Array, " m"]:
    return self.log_normaliser - self.target_logit / self.target_sum

  @classmethod
  def empty(cls, size: int) -> "Stats":
    zeros = jnp.zeros(size)
    return cls(zeros + LOWEST, zeros, zeros, zeros, zeros - jnp.inf)

  @classmethod
  def of_tile(cls, tile: Tile, logits: Array, targets: Array, axis: int) -> "Stats":
    """Statistics of the tile's rows (axis 1) or columns (axis 0)."""
    max_logit = logits.max(axis=axis)
    exp = jnp.where(tile.allowed, jnp.exp(logits - jnp.expand_dims(max_logit, axis)), 0.0)
    negative = tile.allowed & ~tile.is_positive
    return cls(
      max_logit, exp.sum(axis=axis), (targets * logits).sum(axis=axis), targets.sum(axis=axis),
      jnp.max(tile.cosines, axis=axis, where=negative, initial=-jnp.inf),
    )

  def merge(self, other: "Stats") -> "Stats":
    """Statistics over the pairs of both."""
    max_logit = jnp.maximum(self.max_logit, other.max_logit)
    return Stats(
      max_logit,
      self.sum_exp * jnp.exp(self.max_logit - max_logit)
      + other.sum_exp * jnp.exp(other.max_logit - max_logit),
      self.target_logit + other.target_logit,
      self.target_sum + other.target_sum,
      jnp.maximum(self.hardest_negative, other.hardest_negative),
    )


class CosineSums(NamedTuple):
  """Sums over a row's pairs that only the metrics need."""

  positive: Float[Array, " m"]  # cosine of the positive
  negatives: Float[Array, " m"]  # Σ cosines of negatives
  count: Float[Array, " m"]  # of negatives

  def add(self, tile: Tile) -> "CosineSums":
    negative = tile.allowed & ~tile.is_positive
    return CosineSums(
      self.positive + jnp.where(tile.is_positive, tile.cosines, 0.0).sum(axis=1),
      self.negatives + jnp.where(negative, tile.cosines, 0.0).sum(axis=1),
      self.count + negative.sum(axis=1, dtype=jnp.float32),
    )


def product(equation: str, a: Array, b: Array) -> Array:
  """An einsum at full precision, as in infonce.cosine_matrix."""
  return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)
