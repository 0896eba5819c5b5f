"""The mesh; batches, which are sharded over `data` and `fsdp`; replicated arrays."""

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
  """The mesh of `mesh.data` x `mesh.fsdp` x `mesh.tensor` devices, where -1 takes what is left.

  Args:
    mesh: the config's section; `fsdp` and `tensor` are 1 if they are absent.
    batch_size: global.
    devices: all by default; others are those of a topology to compile for.

  Raises:
    UserError: more devices asked for than exist, or the global batch does not divide.
  """
  available = list(jax.devices() if devices is None else devices)
  sizes = {axis: mesh.get(axis, 1) for axis in AXES}
  text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
  for axis, size in sizes.items():
    if size != -1 and size < 1:
      raise UserError(f"mesh.{axis} is {size}; use a positive number, or -1 for what is left")
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise UserError(f"{text}: only one axis can take what the others leave")
  for axis in free:
    sizes[axis] = len(available) // math.prod(n for n in sizes.values() if n > 0)
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
  shards = sizes["data"] * sizes["fsdp"]
  if batch_size % shards:
    raise UserError(
      f"train.batch_size={batch_size} does not divide over {shards} devices ({text}); "
      f"use a multiple of {shards} or set mesh.data"
    )
  return jax.make_mesh(
    tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=available[:count]
  )


def replicated_sharding(mesh: Mesh) -> NamedSharding:
  """Every device has all of the array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first dimension is sharded over `data` and `fsdp`."""
  return NamedSharding(mesh, _BATCH)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of the global batch on this process's devices, in order.

  Processes with the same `data` and `fsdp` indices (tensor across hosts) have the same rows, others
  have none in common. On a TPU slice they need not be consecutive: the mesh follows the wires, not
  the hosts.
  """
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return sorted({row for (index,) in indices for row in range(batch_size)[index]})


def pad_batch(rows: np.ndarray, size: int) -> np.ndarray:
  """Repeats the last row up to `size` rows, the one shape that is compiled."""
  rows = np.asarray(rows)
  return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows (`local_rows`) of a batch -> global arrays [B, ...] on the mesh."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
  """The pytree with all of each array on every device of the mesh."""
  return jax.device_put(tree, replicated_sharding(mesh))


def gather_to_host(tree: Any) -> Any:
  """Complete numpy arrays in every process; of several processes all must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
