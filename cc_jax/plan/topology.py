"""The devices that are planned for."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cc_jax.errors import UserError
from cc_jax.plan import chips
from cc_jax.plan.chips import Chip

# Where it is compiled for.


class Slice(NamedTuple):
  """The devices that are planned for."""

  devices: Sequence[Any]
  chip: Chip
  sides: tuple[int, ...]  # of the torus


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
  """'v5e:4x4' -> the chip, and the sides of the slice.

  Raises:
    UserError: it names no TPU of chips.CHIPS, or no sides.
  """
  known = [chip.name for chip in chips.CHIPS if chip.clock]
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
  if not found or found[1] not in known:
    raise UserError(
      f"--topology={name!r} is no slice; write one of {', '.join(known)}, a colon and its sides, "
      "such as v5e:4x4 or v5p:2x2x4, or local"
    )
  return chips.find(found[1]), tuple(int(side) for side in found[2].split("x"))


def find_slice(name: str, dtype: str) -> Slice:
  """The devices of a topology; without a TPU they can be compiled for, and nothing more.

  Raises:
    UserError: see `parse_topology`; libtpu is missing, or knows no such slice.
  """
  if name == "local":
    devices = jax.devices()
    chip = chips.find(devices[0].device_kind) or measured_chip(devices, dtype)
    return Slice(devices, chip, (len(devices),))
  chip, sides = parse_topology(name)
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine's metadata is asked for
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except Exception as error:  # whatever the plugin raises
    text = " ".join(str(error).split())
    remedy = "is libtpu installed (pip install -e '.[tpu]')?"
    raise UserError(f"--topology={name}: {text[:200]}; {remedy}") from error
  return Slice(devices, chip, sides)


def measured_chip(devices: Sequence[Any], dtype: str) -> Chip:
  """A device that is in no table, by what all of them reach at once: a product and a copy."""
  count, side = len(devices), 1024
  mesh = Mesh(np.asarray(devices), ("d",))
  place = NamedSharding(mesh, PartitionSpec("d"))
  x = jax.device_put(jnp.ones((count, side, side), dtype), place)
  big = jax.device_put(jnp.ones((count, 2**24), jnp.float32), place)
  product = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x), out_shardings=place)
  copy = jax.jit(lambda x: x + 1, out_shardings=place)
  flops = 2 * side**3 / _seconds(product, x)
  bandwidth = 2 * 4 * 2**24 / _seconds(copy, big)
  kind = f"{devices[0].device_kind} (measured here)"
  return Chip(kind, (), math.inf, flops, bandwidth, bandwidth, None, "a product and a copy, timed")


def _seconds(function: Callable, *arguments: Any, repeats: int = 5) -> float:
  """The best of some runs, the first left out."""
  times = []
  for _ in range(repeats + 1):
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - began)
  return min(times[1:])
