"""Processes and virtual CPU devices: what must be set before JAX is used."""

import ctypes
import importlib.util
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
from data_pipeline.cores import available_cores

JOIN_TIMEOUT = 300  # seconds in which all processes must have joined
# Where launchers say how many processes they started: JAX's own variable, srun's, mpirun's.
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # of one slice, comma-separated


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
      processes = mesh.get("processes", 1)
      if processes == -1:
        processes = (launched_processes() or (1,))[0]
      count = max(1, math.prod(sizes) // processes)
    else:
      count = max(n for n in range(1, available_cores() + 1) if batch_size % n == 0)
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

  By default each step of a CPU program maps every large buffer again, and the kernel zeroes its
  pages fault by fault: 145,000 faults and a sixth of the processor time of a mini step, none with
  these settings. It must precede the threads of JAX's CPU client, which would get arenas of their
  own: those end at 64 MiB, beside which larger buffers are mapped each time. It has no effect on
  runs with an accelerator, whose hosts want an arena per thread, nor with another C library.
  """
  if not _will_run_on_cpu():
    return
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return
  mallopt(-8, 1)  # M_ARENA_MAX
  mallopt(-4, 0)  # M_MMAP_MAX: no mappings of single buffers
  mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes at the heap's end before it shrinks
  mallopt(-2, 2**26)  # M_TOP_PAD: grow by 64 MiB at a time


def _will_run_on_cpu() -> bool:
  """Whether JAX has nothing but the CPU, as far as can be told before it is used."""
  if platforms := jax.config.jax_platforms:
    return platforms.split(",")[0] == "cpu"
  return not any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu"))


def launched_processes() -> tuple[int, str] | None:
  """(number of processes, the variable that says so), or None where the environment is silent.

  A TPU slice without these variables, and Kubernetes, are asked by JAX when it joins them.
  """
  for name in _COUNTS:
    if text := os.environ.get(name):
      if not text.isdigit() or int(text) < 1:
        raise UserError(f"{name}={text} is no number of processes; unset it or give 1 or more")
      return int(text), name
  for name in _TPU_HOSTS:
    if hosts := os.environ.get(name):
      count = len(hosts.split(",")) * int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
      return (count, name) if count > 1 else None
  return None


def initialize_distributed(mesh: ml_collections.ConfigDict) -> str:
  """Starts jax.distributed unless there is one process: `mesh.processes`, or -1 to ask the cluster.

  Call it before anything else uses jax. Address, number and index of the process come from
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from a cluster that JAX knows: a
  TPU slice (its metadata), Slurm, Open MPI, a Kubernetes Job or JobSet (`pip install 'jax[k8s]'`).

  Returns:
    The table of processes and their devices; '' for a single process.

  Raises:
    UserError: another number of processes than `mesh.processes` was started; no coordinator, or not
      all processes joined within JOIN_TIMEOUT.
  """
  expected = mesh.get("processes", 1)
  if expected != -1 and expected < 1:
    raise UserError(
      f"mesh.processes is {expected}; use the number of processes, or -1 for what the cluster says"
    )
  launched, address = launched_processes(), os.environ.get("JAX_COORDINATOR_ADDRESS")
  if launched and expected not in (-1, launched[0]):
    count, variable = launched
    raise UserError(
      f"mesh.processes is {expected}, but {variable} says that {count} were started; set "
      f"mesh.processes={count}, or -1 to take what the cluster says"
    )
  if not address and (expected == 1 or (expected == -1 and launched and launched[0] == 1)):
    return ""
  if not jax.distributed.is_initialized() and not _join(expected, launched, address):
    return "mesh.processes=-1: JAX found no cluster, so this is one process"
  table, count = describe_processes(), jax.process_count()
  if expected not in (-1, count):
    raise UserError(
      f"{count} of {expected} processes (mesh.processes) joined; start the others or set "
      f"mesh.processes={count}. {'; '.join(table.splitlines())}"
    )
  return table


def _join(expected: int, launched: tuple[int, str] | None, address: str | None) -> bool:
  """jax.distributed.initialize; False if `expected` is -1 and there is nothing to join."""
  variables = {key: os.environ.get(f"JAX_{key.upper()}") for key in ("num_processes", "process_id")}
  count = launched[0] if launched else expected
  # If others never join, JAX ends the process with a stack dump; the alarm precedes it.
  processes = "the cluster's processes" if count == -1 else f"{count} processes"
  alarm = threading.Timer(JOIN_TIMEOUT, _give_up, (processes, address))
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
    if expected == -1 and isinstance(error, ValueError) and not (launched or address):
      return False
    raise UserError(
      f"{processes} (mesh.processes={expected}) did not come together in {JOIN_TIMEOUT} s: "
      f"{one_line(error)[:200]}; set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and "
      "JAX_PROCESS_ID, or set mesh.processes=1"
    ) from error
  finally:
    alarm.cancel()
  return True


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
