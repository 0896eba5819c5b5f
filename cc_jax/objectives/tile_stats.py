"""Some columns of all rows at a time: their pairs, and a row's or a column's loss so far."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cc_jax.objectives.infonce import l2_normalize
from cc_jax.objectives.pairs import clipped

# Stands for minus infinity, whose difference with itself would be NaN.
LOWEST = -1e30


class Samples(NamedTuple):
  """What is known of M samples besides their features."""

  number: Int[Array, " m"]  # in the global batch
  subject: Int[Array, " m"] | None
  look: Float[Array, "m e"] | None  # unit vectors whose products are S
  targets: Float[Array, " m"] | None = None  # the sum that normalises a row of soft targets


class Stats(NamedTuple):
  """A row's, or a column's, loss over the pairs seen so far."""

  top: Float[Array, " m"]  # largest logit
  mass: Float[Array, " m"]  # Σ exp(logit - top)
  aim: Float[Array, " m"]  # Σ target * logit
  targets: Float[Array, " m"]  # Σ target
  nearest: Float[Array, " m"]  # largest cosine of a negative

  @property
  def normaliser(self) -> Float[Array, " m"]:
    return self.top + jnp.log(self.mass)

  @property
  def loss(self) -> Float[Array, " m"]:
    return self.normaliser - self.aim / self.targets


class Sums(NamedTuple):
  """What the metrics need of a row besides."""

  own: Float[Array, " m"]  # cosine of the positive
  negatives: Float[Array, " m"]  # Σ cosines of negatives
  count: Float[Array, " m"]


class Tile(NamedTuple):
  """Some columns of all rows."""

  cosines: Float[Array, "r k"]
  similarity: Float[Array, "r k"] | None
  own: Bool[Array, "r k"]
  allowed: Bool[Array, "r k"]


def make_tile(rule, a, rows: Samples, b, columns: Samples, fresh) -> Tile:
  own = (rows.number[:, None] == columns.number) & fresh
  allowed = jnp.broadcast_to(fresh, own.shape)
  if rows.subject is not None:  # see infonce.allowed_pairs
    same = (rows.subject[:, None] == columns.subject) & (rows.subject >= 0)[:, None]
    allowed = fresh & (own | ~same)
  similarity = None
  if rule.needs_similarity:
    similarity = clipped(product("re,ke->rk", rows.look, columns.look))
  return Tile(product("rd,kd->rk", a, b), similarity, own, allowed)


def tile_stats(pairs: Tile, logits: Array, targets: Array, axis: int) -> Stats:
  """Statistics of a tile alone, of its rows (axis 1) or its columns (axis 0)."""
  top = logits.max(axis=axis)
  mass = jnp.where(pairs.allowed, jnp.exp(logits - jnp.expand_dims(top, axis)), 0.0)
  negative = pairs.allowed & ~pairs.own
  return Stats(
    top,
    mass.sum(axis=axis),
    (targets * logits).sum(axis=axis),
    targets.sum(axis=axis),
    jnp.max(pairs.cosines, axis=axis, where=negative, initial=-jnp.inf),
  )


def no_stats(size: int) -> Stats:
  zeros = jnp.zeros(size)
  return Stats(zeros + LOWEST, zeros, zeros, zeros, zeros - jnp.inf)


def merge(one: Stats, other: Stats) -> Stats:
  """Statistics over the pairs of both."""
  top = jnp.maximum(one.top, other.top)
  return Stats(
    top,
    one.mass * jnp.exp(one.top - top) + other.mass * jnp.exp(other.top - top),
    one.aim + other.aim,
    one.targets + other.targets,
    jnp.maximum(one.nearest, other.nearest),
  )


def product(equation: str, one: Array, other: Array) -> Array:
  """At full precision, as in infonce.cosine_matrix."""
  return jnp.einsum(equation, one, other, precision=lax.Precision.HIGHEST)


def make_samples(rule, n, embed, subject_ids) -> Samples:
  look = l2_normalize(lax.stop_gradient(embed)) if rule.needs_similarity else None
  return Samples(jnp.arange(n, dtype=jnp.int32), subject_ids, look)
