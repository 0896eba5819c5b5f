"""The mesh, and what lies where on it: the batch over `data`, everything else on every device.

The only file that knows how many devices there are. Axes are made `Auto`: XLA's partitioner reads
the placement of a jitted function's arguments and inserts the collectives.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cc_jax.errors import UserError


def set_cpu_devices(mesh: ml_collections.ConfigDict, batch_size: int) -> None:
  """Splits the CPU into virtual devices; call it before anything else touches jax's devices.

  One device per core keeps all cores busy, which XLA's convolutions on one CPU device do not.
  `mesh.cpu_devices = -1` means one per core, at most as many as divide the global batch. With an
  accelerator this has no effect, since the mesh is made of the default platform's devices.
  """
  count = mesh.cpu_devices
  if count == -1:
    cores = mesh.data if mesh.data > 0 else len(os.sched_getaffinity(0))
    count = max(n for n in range(1, cores + 1) if batch_size % n == 0)
  if count < 1:
    raise UserError(f"mesh.cpu_devices is {count}; use -1 (one per core) or a positive number")
  # A busy or sleeping laptop must not be taken for a deadlock between the virtual devices.
  patience = "--xla_cpu_collective_call_terminate_timeout_seconds"
  if patience not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}=3600".strip()
  keep_freed_memory()
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # jax already runs (a notebook, a test): make_mesh takes the devices that there are


def keep_freed_memory() -> None:
  """Tells glibc to keep freed memory for the next step instead of handing it to the kernel.

  By default every large buffer of a CPU program is mapped anew each step, and the kernel zeroes its
  pages one fault at a time: a fifth of the time of a small training. No effect elsewhere.
  """
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return
  mallopt(-4, 0)  # M_MMAP_MAX: no mappings of single buffers
  mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes at the heap's end before it shrinks
  mallopt(-2, 2**26)  # M_TOP_PAD: grow by 64 MiB at a time
  mallopt(-8, 1)  # M_ARENA_MAX: other arenas fall back on mappings for all that is large


def make_mesh(mesh: ml_collections.ConfigDict, batch_size: int) -> Mesh:
  """A mesh with the axis `data` over `mesh.data` devices, -1 meaning all of them.

  Raises:
    UserError: more devices asked for than exist, or the global batch does not divide.
  """
  available = jax.devices()
  count = len(available) if mesh.data == -1 else mesh.data
  if not 1 <= count <= len(available):
    raise UserError(
      f"mesh.data is {mesh.data} but there are {len(available)} devices; "
      "use -1, or set mesh.cpu_devices when there is no accelerator"
    )
  if batch_size % count:
    raise UserError(
      f"train.batch_size={batch_size} does not divide over {count} devices; "
      f"use a multiple of {count} or set mesh.data"
    )
  return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=available[:count])


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device: the frozen base, the adapter, its optimizer."""
  return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
  """The first dimension cut over `data`: batches."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's share [B / processes, ...] -> global arrays [B, ...] over `data`."""
  sharding = over_data(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_replicated(tree: Any, mesh: Mesh) -> Any:
  """The same pytree whole on every device of the mesh."""
  return jax.device_put(tree, replicated(mesh))
