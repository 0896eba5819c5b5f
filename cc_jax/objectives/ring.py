"""The columns' way around the mesh: each device passes its block on to the next until it is home.

Nothing of size N exists on any device, and there is no sum over devices at the end: a block carries
its columns' statistics, or gradients, along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from cc_jax.objectives.tiled import Samples


@dataclasses.dataclass(frozen=True)
class Ring:
  """A tour for `tiled.tiled`; see `tiled.Gathered` for its fields and methods."""

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
