"""The contrastive loss of infonce.py without its N x N matrices.

Rows are this device's R samples. Their columns come in tiles, in which cosines, S, masks and
targets are made, used and forgotten: what stays is a few numbers per row and, where the loss goes
both ways, per column, so that one pass over the pairs serves both directions. The gradient makes
each tile again from the rows' normalisers (`custom_vjp`: plain autodiff would keep every tile). A
scan over the G groups lets one tile's memory serve all.

Where the columns come from is the tour's business: see key_exchange.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from cc_jax.objectives.infonce import l2_normalize
from cc_jax.objectives.pairs import PairLoss
from cc_jax.objectives.tile_stats import (
  LOWEST,
  Sums,
  make_samples,
  make_tile,
  merge,
  no_stats,
  product,
  tile_stats,
)

Metrics = dict[str, Float[Array, ""]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled(
  rule: PairLoss,
  tour: Any,
  x: Float[Array, "g n d"],
  y: Float[Array, "g n d"],
  embed: Float[Array, "n e"] | None,
  subject_ids: Int[Array, " n"] | None,
) -> tuple[Float[Array, ""], Metrics]:
  """(loss, metrics) as `infonce.naive` has them; the metrics carry no gradient.

  Args:
    rule: with a plain number as its temperature.
    tour: `Gathered` or `ring.Ring`. With a mesh, N is cut over its `axes`.
  """
  return _forward(rule, tour, x, y, embed, subject_ids)[0]


def _forward(rule, tour, x, y, embed, subject_ids):
  """(what `tiled` returns, what the gradient needs of the rows)."""
  n = x.shape[1]
  samples = make_samples(rule, n, embed, subject_ids)

  def local(x, y, rows):
    columns, r = tour.share(rows), rows.number.shape[0]

    def group(_, features):
      a, b = (l2_normalize(f) for f in features)
      start = (no_stats(r), Sums(*jnp.zeros((3, r))))
      see = functools.partial(_see, rule, tour.tile, a, rows)
      blank = no_stats if rule.both_ways else lambda m: None
      (stats, sums), of_columns = tour.visit(see, start, b, columns, blank)
      return None, (stats, sums, of_columns)

    _, (stats, sums, of_columns) = lax.scan(group, None, (x, y))
    sides = [stats, of_columns] if rule.both_ways else [stats]
    totals = {
      "loss": sum(side.loss.sum() for side in sides) / len(sides),
      "accuracy": sum((sums.own > side.nearest).sum() for side in sides) / len(sides),
      "positive": sums.own.sum(),
      "negatives": sums.negatives.sum(axis=-1),  # [G]
      "count": sums.count.sum(axis=-1),
    }
    kept = (stats.normaliser, stats.targets[0], of_columns and of_columns.normaliser)
    return _sum_devices(tour, totals), kept

  cut, by_row = _specs(tour)
  totals, kept = _on_mesh(
    tour, local, (by_row, by_row, cut), (PartitionSpec(), (by_row, cut, by_row))
  )(x, y, samples)
  size = x.shape[0] * n
  metrics = {
    "positive": totals["positive"] / size,
    "negative": (totals["negatives"] / jnp.maximum(totals["count"], 1)).mean(),
    "accuracy": totals["accuracy"] / size,
  }
  return (totals["loss"] / size, metrics), kept


def _forward_and_keep(rule, tour, x, y, embed, subject_ids):
  out, kept = _forward(rule, tour, x, y, embed, subject_ids)
  return out, (x, y, embed, subject_ids, kept)


def _backward(rule, tour, arguments, cotangents):
  x, y, embed, subject_ids, (normaliser, targets, column_normaliser) = arguments
  n = x.shape[1]
  samples = make_samples(rule, n, embed, subject_ids)
  samples = samples._replace(targets=targets if rule.soft else None)
  share = cotangents[0] / (x.shape[0] * n * (2 if rule.both_ways else 1))

  def local(x, y, normaliser, column_normaliser, rows, share):
    columns = tour.share(rows)

    def group(_, inputs):
      x, y, normaliser, column_normaliser = inputs
      (a, to_x), (b, to_y) = (jax.vjp(l2_normalize, f) for f in (x, y))
      back = functools.partial(_back, rule, tour.tile, a, rows, normaliser, share)

      def blank(m):
        return jnp.zeros((m, b.shape[1]))

      d_a, d_b = tour.visit(back, jnp.zeros_like(a), (b, column_normaliser), columns, blank)
      return None, (*to_x(d_a), *to_y(d_b))

    return lax.scan(group, None, (x, y, normaliser, column_normaliser))[1]

  cut, by_row = _specs(tour)
  everywhere = PartitionSpec()
  d_x, d_y = _on_mesh(
    tour, local, (by_row, by_row, by_row, by_row, cut, everywhere), (by_row, by_row)
  )(x, y, normaliser, column_normaliser, samples, share)
  return d_x, d_y, None, None  # S and the subjects have no gradient


tiled.defvjp(_forward_and_keep, _backward)


def _see(rule, tile, a, rows, carry, b, columns, of_columns):
  """Adds the pairs of all rows with these M columns to both sides' statistics."""

  def body(carry, place):
    (stats, sums), of_columns = carry
    pairs = make_tile(rule, a, rows, place.cut(b), place.cut(columns), place.fresh)
    logits = jnp.where(
      pairs.allowed, rule.logits(pairs.cosines, pairs.similarity, pairs.own), LOWEST
    )
    targets = rule.targets(pairs.similarity, pairs.own, pairs.allowed)
    stats = merge(stats, tile_stats(pairs, logits, targets, axis=1))
    negative = pairs.allowed & ~pairs.own
    sums = Sums(
      sums.own + jnp.where(pairs.own, pairs.cosines, 0.0).sum(axis=1),
      sums.negatives + jnp.where(negative, pairs.cosines, 0.0).sum(axis=1),
      sums.count + negative.sum(axis=1, dtype=jnp.float32),
    )
    if rule.both_ways:
      seen = merge(place.cut(of_columns), tile_stats(pairs, logits, targets, axis=0))
      of_columns = place.put(of_columns, seen)
    return (stats, sums), of_columns

  return _over_tiles(tile, columns.number.shape[0], body, (carry, of_columns))


def _back(rule, tile, a, rows, normaliser, share, d_a, keys, columns, d_b):
  """Adds to the gradients of all rows, d_a [R, D], and of these M columns, d_b [M, D]."""
  b, column_normaliser = keys

  def body(carry, place):
    d_a, d_b = carry
    b_tile, others = place.cut((b, columns))
    pairs = make_tile(rule, a, rows, b_tile, others, place.fresh)
    logits, to_cosines = jax.vjp(
      lambda c: rule.logits(c, pairs.similarity, pairs.own), pairs.cosines
    )
    targets = rule.targets(pairs.similarity, pairs.own, pairs.allowed)
    # Cross-entropy: the gradient of a logit is its softmax minus its target.
    d_logits = jnp.exp(logits - normaliser[:, None]) - (
      targets / rows.targets[:, None] if rule.soft else targets
    )
    if rule.both_ways:
      d_logits += jnp.exp(logits - place.cut(column_normaliser)) - (
        targets / others.targets if rule.soft else targets
      )
    (d_cosines,) = to_cosines(jnp.where(pairs.allowed, d_logits * share, 0.0))
    d_a = d_a + product("rk,kd->rd", d_cosines, b_tile)
    d_b = place.put(d_b, place.cut(d_b) + product("rk,rd->kd", d_cosines, a))
    return d_a, d_b

  return _over_tiles(tile, columns.number.shape[0], body, (d_a, d_b))


class _Place(NamedTuple):
  """K neighbouring columns of a block."""

  start: Int[Array, ""]
  width: int
  fresh: Bool[Array, " k"]  # not seen by the tile before

  def cut(self, tree: Any) -> Any:
    return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, self.start, self.width), tree)

  def put(self, tree: Any, part: Any) -> Any:
    put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=self.start, axis=0)
    return jax.tree.map(put, tree, part)


def _over_tiles(tile: int, size: int, body: Callable, carry: Any) -> Any:
  """body(carry, place) for every tile of `size` columns.

  Where they do not divide, the last tile begins earlier and leaves out what was seen: no padding.
  """
  width = min(tile, size)

  def one(i, carry):
    start = jnp.minimum(i * width, size - width)
    return body(carry, _Place(start, width, start + jnp.arange(width) >= i * width))

  return lax.fori_loop(0, -(-size // width), one, carry)


def _specs(tour) -> tuple[PartitionSpec, PartitionSpec]:
  """Placement of [N, ...] and [G, N, ...]."""
  return PartitionSpec(tour.axes), PartitionSpec(None, tour.axes)


def _on_mesh(tour, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """`function` on every device's share; on its own where there is one device."""
  if not tour.axes:
    return function
  # check_vma: what is returned whole was summed over all devices of `axes` by hand.
  return jax.shard_map(
    function, mesh=tour.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _sum_devices(tour, tree: Any) -> Any:
  return lax.psum(tree, tour.axes) if tour.axes else tree
