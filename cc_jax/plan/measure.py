"""Measurements on this machine: the time of a program, and what an unknown device reaches."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cc_jax.plan.chips import Chip


def best_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
  """The shortest of `repeats` runs, after one that does not count."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return min(times[1:])


def measure_chip(devices: Sequence[Any], dtype: str) -> Chip:
  """A device that is in no table, by what all of them reach at once: a product and a copy."""
  count, side = len(devices), 1024
  sharding = NamedSharding(Mesh(np.asarray(devices), ("d",)), PartitionSpec("d"))
  x = jax.device_put(jnp.ones((count, side, side), dtype), sharding)
  large = jax.device_put(jnp.ones((count, 2**24), jnp.float32), sharding)
  product = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x), out_shardings=sharding)
  copy = jax.jit(lambda x: x + 1, out_shardings=sharding)
  flops = 2 * side**3 / best_seconds(lambda: product(x))
  bandwidth = 2 * 4 * 2**24 / best_seconds(lambda: copy(large))
  kind = f"{devices[0].device_kind} (measured here)"
  return Chip(kind, (), math.inf, flops, bandwidth, bandwidth, None, "a product and a copy, timed")


def measure_program(
  compiled: Callable, arguments: tuple[Any, ...], repeats: int = 5
) -> dict[str, Any]:
  """Runs a compiled program on this machine: {'seconds', 'memory': peak bytes or None}.

  Args:
    arguments: pytrees of ShapeDtypeStruct with shardings. They are filled with constants: what a
      step costs does not depend on the weights.
  """

  def fill(leaf):
    value = 0.02 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
    return jnp.full(leaf.shape, value, leaf.dtype)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)
  state, *rest = jax.jit(lambda: jax.tree.map(fill, arguments), out_shardings=shardings)()
  structure = jax.tree.structure(state)

  def run():
    nonlocal state
    out = compiled(state, *rest)
    if isinstance(out, tuple) and jax.tree.structure(out[0]) == structure:
      state = out[0]  # the old one was donated
    return out

  seconds = best_seconds(run, repeats)
  stats = jax.local_devices()[0].memory_stats() or {}
  return {"seconds": seconds, "memory": stats.get("peak_bytes_in_use")}
