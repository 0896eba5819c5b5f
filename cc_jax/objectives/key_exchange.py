"""How every device's rows meet the keys of all devices: gathered at once, or passed around a ring.

The key state is what is accumulated for each key (a column of the matrix of pairs), its statistics
or its gradient. In the end it is on the device that owns the key.
"""

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
class KeyExchange:
  """How `tiled.tiled` gets to the keys of all devices: `AllGather` or `Ring`."""

  tile: int  # columns in a tile
  mesh: Mesh | None = None  # None: one device
  axes: tuple[str, ...] = ()  # the mesh's axes over which the batch is sharded

  def prepare(self, samples: Samples) -> Samples:
    """This device's samples -> those that `scan_keys` takes, for all groups."""
    return samples

  def scan_keys(
    self, function: Callable, carry: Any, keys: Any, samples: Samples, init_key_state: Callable
  ) -> tuple[Any, Any]:
    """`carry, key_state = function(carry, keys, samples, key_state)` over the keys of all devices.

    Args:
      keys: this device's columns of one group.
      samples: of `prepare`.
      init_key_state: number of columns -> their key state at the start.

    Returns:
      (carry, the key state of this device's columns, accumulated over all devices).
    """


class AllGather(KeyExchange):
  """All keys of a group are gathered on every device: N x D floats."""

  def prepare(self, samples):
    return jax.tree.map(self._gather, samples)

  def scan_keys(self, function, carry, keys, samples, init_key_state):
    keys, key_state = jax.tree.map(self._gather, keys), init_key_state(samples.index.shape[0])
    carry, key_state = function(carry, keys, samples, key_state)
    return carry, self._reduce_to_owner(key_state) if self.axes else key_state

  def _gather(self, x: Array) -> Array:
    return lax.all_gather(x, self.axes, tiled=True) if self.axes else x

  def _reduce_to_owner(self, key_state: Any) -> Any:
    """Combines what all devices accumulated for all columns; returns this device's columns."""
    if not isinstance(key_state, Stats):
      scatter = functools.partial(lax.psum_scatter, axis_name=self.axes, tiled=True)
      return jax.tree.map(scatter, key_state)
    s, max_logit = key_state, lax.pmax(key_state.max_logit, self.axes)
    reduced = Stats(
      max_logit, lax.psum(s.sum_exp * jnp.exp(s.max_logit - max_logit), self.axes),
      lax.psum(s.target_logit, self.axes), lax.psum(s.target_sum, self.axes),
      lax.pmax(s.hardest_negative, self.axes),
    )
    size = max_logit.shape[0] // lax.axis_size(self.axes)
    start = lax.axis_index(self.axes) * size
    return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, size), reduced)


class Ring(KeyExchange):
  """Each device passes its block of keys to the next until the block is back at its owner.

  No device holds an array of size N. Samples and key state travel with their block: no reduction.
  """

  def scan_keys(self, function, carry, keys, samples, init_key_state):
    key_state = init_key_state(samples.index.shape[0])
    if not self.axes:
      return function(carry, keys, samples, key_state)

    def visit_block(state, _):
      carry, keys, samples, key_state = state
      received = self._pass_on((keys, samples))  # first, so that it overlaps the computation
      carry, key_state = function(carry, keys, samples, key_state)
      return (carry, *received, self._pass_on(key_state)), None

    state, size = (carry, keys, samples, key_state), lax.axis_size(self.axes)
    (carry, _, _, key_state), _ = lax.scan(visit_block, state, None, length=size)
    return carry, key_state

  def _pass_on(self, tree: Any) -> Any:
    size = lax.axis_size(self.axes)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, self.axes, ring), tree)
