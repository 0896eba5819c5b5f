"""Processes and the CPU: starting jax.distributed, virtual CPU devices."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import sys
import threading

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from cc_jax.errors import UserError
from cc_jax.parallel.mesh import AXES

JOIN_TIMEOUT = 300  # seconds in which all processes must have joined


# Processes and devices.


def set_cpu_devices(mesh: ml_collections.ConfigDict, batch_size: int) -> None:
  """Splits the CPU into virtual devices; call it before anything else touches jax's devices.

  One device per core keeps all cores busy, which XLA's convolutions on one CPU device do not.
  `mesh.cpu_devices = -1` means one per core, at most as many as divide the global batch. With an
  accelerator this has no effect, since the mesh is made of the default platform's devices.
  """
  count = mesh.cpu_devices
  if count == -1:
    sizes = [mesh.get(axis, 1) for axis in AXES]
    if min(sizes) > 0:
      count = max(1, math.prod(sizes) // mesh.get("processes", 1))
    else:
      cores = len(os.sched_getaffinity(0))
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


def initialize_distributed(mesh: ml_collections.ConfigDict) -> str:
  """Starts jax.distributed where config or environment ask for it; before anything else uses jax.

  They do where `mesh.processes` is more than 1 or JAX_COORDINATOR_ADDRESS is set. Address, number
  and index of the process come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
  or from what JAX knows of the cluster: a TPU slice, Slurm, Open MPI, Kubernetes.

  Returns:
    The table of processes and their devices; '' where nothing was asked for.

  Raises:
    UserError: nobody to join, or fewer processes than `mesh.processes` within JOIN_TIMEOUT.
  """
  expected = mesh.get("processes", 1)
  if expected < 1:
    raise UserError(f"mesh.processes is {expected}; use the number of processes, 1 or more")
  given = {key: os.environ.get(f"JAX_{key.upper()}") for key in ("num_processes", "process_id")}
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if expected == 1 and not address:
    return ""
  if not jax.distributed.is_initialized():
    # Where others never call, JAX ends the process with a stack dump; we say it before that.
    wanted = given["num_processes"] or expected
    alarm = threading.Timer(JOIN_TIMEOUT, _give_up, (f"{wanted} processes", address))
    alarm.daemon = True
    alarm.start()
    try:
      jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for tests on CPUs
      jax.distributed.initialize(
        **{key: int(value) for key, value in given.items() if value},
        cluster_detection_method="deactivate" if address and all(given.values()) else None,
        initialization_timeout=JOIN_TIMEOUT + 30,
      )
    except (ValueError, RuntimeError) as error:
      reason = " ".join(str(error).split())[:200]
      raise UserError(
        f"{expected} processes (mesh.processes) did not come together in {JOIN_TIMEOUT} s: "
        f"{reason}; set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, "
        "or set mesh.processes=1"
      ) from error
    finally:
      alarm.cancel()
  table = describe_processes()
  if jax.process_count() < expected:
    raise UserError(
      f"{jax.process_count()} of {expected} processes (mesh.processes) joined; start the others "
      f"or set mesh.processes. {'; '.join(table.splitlines())}"
    )
  return table


def _give_up(wanted: str, address: str | None) -> None:
  print(
    f"error: {wanted} did not all join at {address or 'the coordinator'} within {JOIN_TIMEOUT} s; "
    "look whether each was started and reaches that address, or set mesh.processes",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def describe_processes() -> str:
  """A line for each process: number, host, devices. A collective call."""
  name = np.zeros(64, np.uint8)
  letters = np.frombuffer(socket.gethostname().encode()[:64], np.uint8)
  name[: len(letters)] = letters
  names = np.atleast_2d(multihost_utils.process_allgather(name))
  lines = []
  for process, letters in enumerate(names):
    devices = [d for d in jax.devices() if d.process_index == process]
    ids = f"{devices[0].id} to {devices[-1].id}" if devices else "none"
    kind = devices[0].device_kind if devices else ""
    host = bytes(letters).rstrip(b"\0").decode(errors="replace")
    lines.append(f"process {process} on {host}: {len(devices)} x {kind}, devices {ids}")
  return "\n".join(lines)
