"""The columns' way around the mesh: each device passes its block on to the next until it is home.

Nothing of size N exists on any device, and there is no sum over devices at the end: a block carries
its columns' statistics, or gradients, along.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from cc_jax.objectives.tile_stats import Samples, Stats


@dataclasses.dataclass(frozen=True)
class Gathered:
  """All columns of a group are brought to every device at once: N x D floats."""

  tile: int  # columns in a tile
  mesh: Mesh | None = None  # None: one device
  axes: tuple[str, ...] = ()  # the mesh's axes over which the batch is cut

  def share(self, samples: Samples) -> Samples:
    """What all groups need of the columns; called once."""
    return jax.tree.map(self._gather, samples)

  def visit(self, function: Callable, carry: Any, keys: Any, samples: Samples, blank: Callable):
    """`carry, travelling = function(carry, keys, samples, travelling)` over all columns.

    Args:
      keys: this device's columns of one group.
      samples: of `share`.
      blank: a count of columns -> what is accumulated for each of them at the start.

    Returns:
      (carry, what was accumulated over all devices for this device's own columns).
    """
    keys = jax.tree.map(self._gather, keys)
    carry, travelling = function(carry, keys, samples, blank(samples.number.shape[0]))
    if self.axes:
      travelling = self._home(travelling)
    return carry, travelling

  def _gather(self, x: Array) -> Array:
    return lax.all_gather(x, self.axes, tiled=True) if self.axes else x

  def _home(self, x: Any) -> Any:
    """Of all devices' parts for all columns: their sum for this device's own."""
    if not isinstance(x, Stats):
      scatter = functools.partial(lax.psum_scatter, axis_name=self.axes, tiled=True)
      return jax.tree.map(scatter, x)
    top = lax.pmax(x.top, self.axes)
    whole = Stats(
      top,
      lax.psum(x.mass * jnp.exp(x.top - top), self.axes),
      lax.psum(x.aim, self.axes),
      lax.psum(x.targets, self.axes),
      lax.pmax(x.nearest, self.axes),
    )
    size = top.shape[0] // lax.axis_size(self.axes)
    start = lax.axis_index(self.axes) * size
    return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, size), whole)


@dataclasses.dataclass(frozen=True)
class Ring:
  """A tour for `tiled.tiled`; see `Gathered` for its fields and methods."""

  tile: int
  mesh: Mesh | None = None
  axes: tuple[str, ...] = ()

  def share(self, samples: Samples) -> Samples:
    return samples  # they travel with the block

  def visit(self, function: Callable, carry: Any, keys: Any, samples: Samples, blank: Callable):
    travelling = blank(samples.number.shape[0])
    if not self.axes:
      return function(carry, keys, samples, travelling)

    def turn(state, _):
      carry, keys, samples, travelling = state
      after = self._pass_on((keys, samples))  # first, so that it can go on while we compute
      carry, travelling = function(carry, keys, samples, travelling)
      return (carry, *after, self._pass_on(travelling)), None

    size = lax.axis_size(self.axes)
    (carry, _, _, travelling), _ = lax.scan(
      turn, (carry, keys, samples, travelling), None, length=size
    )
    return carry, travelling

  def _pass_on(self, tree: Any) -> Any:
    size = lax.axis_size(self.axes)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, self.axes, ring), tree)
