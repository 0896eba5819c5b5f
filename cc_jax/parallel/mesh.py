"""The mesh, and batches and whole trees on it.

Axes are made `Auto`: XLA's partitioner reads the placement of a jitted function's arguments and
inserts the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cc_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
_BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(
  mesh: ml_collections.ConfigDict, batch_size: int, devices: Sequence[Any] | None = None
) -> Mesh:
  """The mesh of `mesh.data` x `mesh.fsdp` x `mesh.tensor` devices, -1 taking what is left.

  Args:
    mesh: the config's section; `fsdp` and `tensor` may be absent and are then 1.
    batch_size: global.
    devices: to be used, for example those of a topology that is only compiled for; default all.

  Raises:
    UserError: more devices asked for than exist, or the global batch does not divide.
  """
  available = list(jax.devices() if devices is None else devices)
  asked = {axis: mesh.get(axis, 1) for axis in AXES}
  sizes = dict(asked)
  text = ", ".join(f"mesh.{axis}={size}" for axis, size in asked.items())
  for axis, size in asked.items():
    if size != -1 and size < 1:
      raise UserError(f"mesh.{axis} is {size}; use a positive number, or -1 for what is left")
  filled = [axis for axis, size in asked.items() if size == -1]
  if len(filled) > 1:
    raise UserError(f"{text}: only one axis can take what the others leave")
  for axis in filled:
    sizes[axis] = len(available) // math.prod(n for n in asked.values() if n > 0)
  count = math.prod(sizes.values())
  if not 1 <= count <= len(available):
    raise UserError(
      f"{text}, but there are {len(available)} devices; use -1, or set mesh.cpu_devices when there "
      "is no accelerator"
    )
  if jax.process_count() > 1 and devices is None and count < len(available):
    raise UserError(
      f"{text} leaves {len(available) - count} of {len(available)} devices out, and with them "
      "perhaps a process; use all, e.g. mesh.data=-1"
    )
  shares = sizes["data"] * sizes["fsdp"]
  if batch_size % shares:
    raise UserError(
      f"train.batch_size={batch_size} does not divide over {shares} devices ({text}); "
      f"use a multiple of {shares} or set mesh.data"
    )
  return jax.make_mesh(
    tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=available[:count]
  )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first dimension cut over `data` and `fsdp`: batches."""
  return NamedSharding(mesh, _BATCH)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of the global batch that this process's devices hold, in order.

  Processes of one `data` and `fsdp` index (tensor across hosts) share rows, others do not. On a TPU
  slice they need not be neighbours: the mesh follows the wires, not the hosts.
  """
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return sorted({row for (part,) in indices for row in range(batch_size)[part]})


def pad_batch(rows: np.ndarray, size: int) -> np.ndarray:
  """`size` rows, the last one repeated: a batch of the one shape that is compiled."""
  rows = np.asarray(rows)
  return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows (`local_rows`) of a batch -> global arrays [B, ...] on the mesh."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
  """The same pytree whole on every device of the mesh."""
  return jax.device_put(tree, replicated_sharding(mesh))


def gather_to_host(tree: Any) -> Any:
  """Whole numpy arrays on every process; where there are several, all of them must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
