"""The contrastive loss of infonce.py without its N x N matrices.

Rows are this device's R samples. Their columns are processed in tiles, whose cosines, S, masks and
targets live no longer than the tile: what remains is a few numbers per row and, where the loss is
symmetric, per column, so that one pass over the pairs serves both directions. The gradient
computes each tile again from the rows' normalisers (`custom_vjp`: plain autodiff would keep every
tile). A scan over the G groups reuses the memory of a tile.

Where the columns come from is the business of a `key_exchange.KeyExchange`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from cc_jax.objectives.infonce import l2_normalize
from cc_jax.objectives.key_exchange import KeyExchange
from cc_jax.objectives.pair_scaling import PairLoss
from cc_jax.objectives.tile_stats import LOWEST, CosineSums, Samples, Stats, Tile, product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled(
  pair_loss: PairLoss, key_exchange: KeyExchange, x: Float[Array, "g n d"],
  y: Float[Array, "g n d"], embed: Float[Array, "n e"] | None,
  subject_ids: Int[Array, " n"] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """(loss, metrics) as `infonce.naive` has them; the metrics carry no gradient.

  Args:
    pair_loss: with a plain number as its temperature.
    key_exchange: with a mesh, N is sharded over its `axes`.
  """
  return _forward(pair_loss, key_exchange, x, y, embed, subject_ids)[0]


def _forward(pair_loss, key_exchange, x, y, embed, subject_ids):
  """(what `tiled` returns, what the gradient needs of the rows)."""
  n = x.shape[1]

  def per_device(x, y, rows):
    columns, r = key_exchange.prepare(rows), rows.index.shape[0]

    def per_group(_, features):
      a, b = (l2_normalize(f) for f in features)
      init = (Stats.empty(r), CosineSums(*jnp.zeros((3, r))))
      add = functools.partial(_add_stats, pair_loss, key_exchange.tile, a, rows)
      init_key_state = Stats.empty if pair_loss.symmetric else lambda m: None
      return None, key_exchange.scan_keys(add, init, b, columns, init_key_state)

    _, ((row_stats, cosine_sums), column_stats) = lax.scan(per_group, None, (x, y))
    sides = [row_stats, column_stats] if pair_loss.symmetric else [row_stats]
    hits = ((cosine_sums.positive > side.hardest_negative).sum() for side in sides)
    totals = {
      "loss": sum(side.loss.sum() for side in sides) / len(sides),
      "accuracy": sum(hits) / len(sides),
      "positive": cosine_sums.positive.sum(),
      "negatives": cosine_sums.negatives.sum(axis=-1),  # [G]
      "count": cosine_sums.count.sum(axis=-1),
    }
    normaliser, target_sum = row_stats.log_normaliser, row_stats.target_sum[0]
    residuals = normaliser, target_sum, column_stats and column_stats.log_normaliser
    return lax.psum(totals, key_exchange.axes) if key_exchange.axes else totals, residuals

  vector, matrix = P(key_exchange.axes), P(None, key_exchange.axes)  # [N, ...], [G, N, ...]
  specs = (matrix, matrix, vector), (P(), (matrix, vector, matrix))
  run = _on_mesh(key_exchange, per_device, *specs)
  totals, residuals = run(x, y, Samples.create(pair_loss, n, embed, subject_ids))
  size = x.shape[0] * n
  metrics = {
    "positive": totals["positive"] / size,
    "negative": (totals["negatives"] / jnp.maximum(totals["count"], 1)).mean(),
    "accuracy": totals["accuracy"] / size,
  }
  return (totals["loss"] / size, metrics), residuals


def _forward_with_residuals(pair_loss, key_exchange, x, y, embed, subject_ids):
  out, residuals = _forward(pair_loss, key_exchange, x, y, embed, subject_ids)
  return out, (x, y, embed, subject_ids, residuals)


def _backward(pair_loss, key_exchange, residuals, cotangents):
  x, y, embed, subject_ids, (normaliser, target_sum, column_normaliser) = residuals
  n = x.shape[1]
  samples = Samples.create(pair_loss, n, embed, subject_ids, target_sum)
  # The loss is a mean over groups, rows and directions: d_loss / d_(loss of a row).
  d_row = cotangents[0] / (x.shape[0] * n * (2 if pair_loss.symmetric else 1))

  def per_device(x, y, normaliser, column_normaliser, rows, d_row):
    columns = key_exchange.prepare(rows)

    def per_group(_, inputs):
      x, y, normaliser, column_normaliser = inputs
      (a, to_x), (b, to_y) = (jax.vjp(l2_normalize, f) for f in (x, y))
      arguments = pair_loss, key_exchange.tile, a, rows, normaliser, d_row
      add = functools.partial(_add_gradients, *arguments)
      keys, init_key_state = (b, column_normaliser), lambda m: jnp.zeros((m, b.shape[1]))
      d_a, d_b = key_exchange.scan_keys(add, jnp.zeros_like(a), keys, columns, init_key_state)
      return None, (*to_x(d_a), *to_y(d_b))

    return lax.scan(per_group, None, (x, y, normaliser, column_normaliser))[1]

  vector, matrix = P(key_exchange.axes), P(None, key_exchange.axes)  # [N, ...], [G, N, ...]
  run = _on_mesh(key_exchange, per_device, (*[matrix] * 4, vector, P()), (matrix, matrix))
  d_x, d_y = run(x, y, normaliser, column_normaliser, samples, d_row)
  return d_x, d_y, None, None  # S and the subjects have no gradient


tiled.defvjp(_forward_with_residuals, _backward)


def _add_stats(pair_loss, tile_size, a, rows, carry, b, columns, column_stats):
  """Adds the pairs of all rows with these M columns to the statistics of both."""

  def add_tile(carry, part):
    (row_stats, cosine_sums), column_stats = carry
    tile = Tile.create(pair_loss, a, rows, part.take(b), part.take(columns), part.is_new)
    logits = pair_loss.logits(tile.cosines, tile.similarity, tile.is_positive)
    logits = jnp.where(tile.allowed, logits, LOWEST)
    targets = pair_loss.targets(tile.similarity, tile.is_positive, tile.allowed)
    row_stats = row_stats.merge(Stats.of_tile(tile, logits, targets, axis=1))
    cosine_sums = cosine_sums.add(tile)
    if pair_loss.symmetric:
      merged = part.take(column_stats).merge(Stats.of_tile(tile, logits, targets, axis=0))
      column_stats = part.update(column_stats, merged)
    return (row_stats, cosine_sums), column_stats

  return _scan_tiles(tile_size, columns.index.shape[0], add_tile, (carry, column_stats))


def _add_gradients(pair_loss, tile_size, a, rows, normaliser, d_row, d_a, keys, columns, d_b):
  """Adds to the gradients of all rows, d_a [R, D], and of these M columns, d_b [M, D]."""
  b, column_normaliser = keys

  def add_tile(carry, part):
    d_a, d_b = carry
    b_tile, tile_columns = part.take((b, columns))
    tile = Tile.create(pair_loss, a, rows, b_tile, tile_columns, part.is_new)
    logits, to_cosines = jax.vjp(
      lambda c: pair_loss.logits(c, tile.similarity, tile.is_positive), tile.cosines
    )
    targets = pair_loss.targets(tile.similarity, tile.is_positive, tile.allowed)
    # Cross-entropy: the gradient of a logit is its softmax minus its target.
    d_logits = jnp.exp(logits - normaliser[:, None]) - (
      targets / rows.target_sum[:, None] if pair_loss.soft else targets
    )
    if pair_loss.symmetric:
      d_logits += jnp.exp(logits - part.take(column_normaliser)) - (
        targets / tile_columns.target_sum if pair_loss.soft else targets
      )
    (d_cosines,) = to_cosines(jnp.where(tile.allowed, d_logits * d_row, 0.0))
    d_a = d_a + product("rk,kd->rd", d_cosines, b_tile)
    return d_a, part.update(d_b, part.take(d_b) + product("rk,rd->kd", d_cosines, a))

  return _scan_tiles(tile_size, columns.index.shape[0], add_tile, (d_a, d_b))


class _ColumnSlice(NamedTuple):
  """K neighbouring columns of a block."""

  start: Int[Array, ""]
  width: int
  is_new: Bool[Array, " k"]  # not part of the tile before

  def take(self, tree: Any) -> Any:
    return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, self.start, self.width), tree)

  def update(self, tree: Any, values: Any) -> Any:
    put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=self.start, axis=0)
    return jax.tree.map(put, tree, values)


def _scan_tiles(tile_size: int, num_columns: int, function: Callable, carry: Any) -> Any:
  """carry = function(carry, _ColumnSlice) for every tile.

  Without padding: the last tile starts early enough to be full, and masks out what was seen.
  """
  width = min(tile_size, num_columns)

  def visit_tile(i, carry):
    start = jnp.minimum(i * width, num_columns - width)
    return function(carry, _ColumnSlice(start, width, start + jnp.arange(width) >= i * width))

  return lax.fori_loop(0, -(-num_columns // width), visit_tile, carry)


def _on_mesh(key_exchange: KeyExchange, function: Callable, in_specs, out_specs) -> Callable:
  """`function` on every device's shard; unchanged where there is one device."""
  if not key_exchange.axes:
    return function
  # check_vma: what is replicated was summed over all devices of `axes` by hand.
  return jax.shard_map(
    function, mesh=key_exchange.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )
