"""Processes and virtual CPU devices: what must be set before JAX is used."""

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

from cc_jax.errors import UserError, one_line
from cc_jax.parallel.mesh import AXES

JOIN_TIMEOUT = 300  # seconds in which all processes must have joined


def set_cpu_devices(mesh: ml_collections.ConfigDict, batch_size: int) -> None:
  """Splits the CPU into virtual devices; call it before anything else uses jax's devices.

  One device per core (`mesh.cpu_devices = -1`, at most as many as divide the global batch) keeps
  all cores busy, which XLA's convolutions on one CPU device do not. It has no effect with an
  accelerator: the mesh has the default platform's devices.
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
  # XLA must not mistake a busy or sleeping laptop for a deadlock between the virtual devices.
  flags = os.environ.get("XLA_FLAGS", "")
  timeout = "--xla_cpu_collective_call_terminate_timeout_seconds"
  if timeout not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {timeout}=3600".strip()
  keep_freed_memory()
  try:
    jax.config.update("jax_num_cpu_devices", count)
  except RuntimeError:
    pass  # jax is in use (a notebook, a test): make_mesh takes the devices that there are


def keep_freed_memory() -> None:
  """Makes glibc keep freed memory for the next step instead of returning it to the kernel.

  By default each step maps every large buffer of a CPU program again, and the kernel zeroes its
  pages fault by fault: a fifth of the time of a small training. It has no effect elsewhere.
  """
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return
  mallopt(-4, 0)  # M_MMAP_MAX: no mappings of single buffers
  mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes at the heap's end before it shrinks
  mallopt(-2, 2**26)  # M_TOP_PAD: grow by 64 MiB at a time


def initialize_distributed(mesh: ml_collections.ConfigDict) -> str:
  """Starts jax.distributed if `mesh.processes` exceeds 1 or JAX_COORDINATOR_ADDRESS is set.

  Call it before anything else uses jax. Address, number and index of the process come from
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from a cluster that JAX knows: a
  TPU slice, Slurm, Open MPI, Kubernetes.

  Returns:
    The table of processes and their devices; '' for a single process.

  Raises:
    UserError: no coordinator, or fewer than `mesh.processes` processes within JOIN_TIMEOUT.
  """
  expected = mesh.get("processes", 1)
  if expected < 1:
    raise UserError(f"mesh.processes is {expected}; use the number of processes, 1 or more")
  variables = {key: os.environ.get(f"JAX_{key.upper()}") for key in ("num_processes", "process_id")}
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if expected == 1 and not address:
    return ""
  if not jax.distributed.is_initialized():
    # If others never join, JAX ends the process with a stack dump; the alarm precedes it.
    count = variables["num_processes"] or expected
    alarm = threading.Timer(JOIN_TIMEOUT, _give_up, (f"{count} processes", address))
    alarm.daemon = True
    alarm.start()
    try:
      jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for tests on CPUs
      jax.distributed.initialize(
        **{key: int(value) for key, value in variables.items() if value},
        cluster_detection_method="deactivate" if address and all(variables.values()) else None,
        initialization_timeout=JOIN_TIMEOUT + 30,
      )
    except (ValueError, RuntimeError) as error:
      raise UserError(
        f"{expected} processes (mesh.processes) did not come together in {JOIN_TIMEOUT} s: "
        f"{one_line(error)[:200]}; set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID, or set mesh.processes=1"
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


def _give_up(processes: str, address: str | None) -> None:
  text = (
    f"error: {processes} did not all join at {address or 'the coordinator'} within {JOIN_TIMEOUT} "
    "s; check that each was started and reaches that address, or set mesh.processes"
  )
  print(text, file=sys.stderr, flush=True)
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
