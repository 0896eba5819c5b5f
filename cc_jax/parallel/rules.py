"""The processes, the mesh, and what lies where on it.

The batch is cut over `data` and `fsdp`, parameters with their optimizer and average over `fsdp` and
`tensor` by RULES; what no rule cuts lies whole on every device. The only file that knows how many
devices and processes there are. Axes are made `Auto`: XLA's partitioner reads the placement of a
jitted function's arguments and inserts the collectives.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cc_jax.errors import UserError
from cc_jax.training.telemetry import align

AXES = ("data", "fsdp", "tensor")
_BATCH = PartitionSpec(("data", "fsdp"))
JOIN_TIMEOUT = 300  # seconds in which all processes must have joined


class Rule(NamedTuple):
  """How the parameters with a matching path are cut."""

  pattern: str  # a regular expression, searched in the path
  # Axis of the mesh -> the dimension that it cuts; None = the largest that divides and is left.
  axes: Mapping[str, int | None]
  above: int = 2**16  # elements; what is smaller lies whole everywhere


# The first rule whose pattern is found counts. `tensor` cuts in Megatron's pairs (arXiv 1909.08053,
# section 3): heads, hidden width or channels of the first product, which the second one sums up.
RULES = (
  Rule(
    r"\b(to_[qkv](_visual)?|[qkv]_proj|ff_in|fc1|net\.0\.proj|conv1)\.kernel$",
    {"tensor": -1, "fsdp": None},
  ),
  Rule(
    r"\b(to_out(\.0)?|out_proj|ff_out|fc2|net\.2|conv2)\.kernel$", {"tensor": -2, "fsdp": None}
  ),
  Rule("", {"fsdp": None}),
)
MAX_WHOLE = 0.02  # of the bytes that the rules should cut
GATHERED = "gathered over fsdp"


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


def join(mesh: ml_collections.ConfigDict) -> str:
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
  table = processes()
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


def processes() -> str:
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


# Placements.


def spec(
  path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Sequence[Rule] | None = None
) -> PartitionSpec:
  """How RULES cut a parameter; dimensions that an axis does not divide are left alone."""
  rule = _rule(path, rules)
  parts: list[str | None] = [None] * len(shape)
  if math.prod(shape) < rule.above:
    return PartitionSpec()
  for axis, dimension in _wanted(rule, mesh).items():
    order = sorted(range(len(shape)), key=lambda d: (shape[d], d), reverse=True)
    if dimension is not None:
      order = [len(shape) + dimension] if -dimension <= len(shape) else []
    for d in order:
      if parts[d] is None and shape[d] % mesh.shape[axis] == 0:
        parts[d] = axis
        break
  return PartitionSpec(*parts) if any(parts) else PartitionSpec()


def placements(
  tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] | None = None
) -> Any:
  """Where RULES lay every array of a tree (arrays, tracers or ShapeDtypeStructs): NamedShardings.

  Works with a mesh of a topology that is only compiled for and with an AbstractMesh, too.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, spec(_name(path), x.shape, mesh, rules)), tree
  )


def placed(tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] | None = None) -> Any:
  """Abstract arrays with their placements: arguments to compile for without any data."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    tree,
    placements(tree, mesh, rules),
  )


def by_name(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """(path, shape) -> placement: what `hub.load_base` asks for each tensor that it reads."""
  return lambda path, shape: NamedSharding(mesh, spec(path, shape, mesh))


def born(mesh: Mesh) -> Callable[[Callable], Callable]:
  """jax.jit for functions that make parameters: each device makes what it is going to hold."""

  def transform(function: Callable) -> Callable:
    def create(*args):
      where: Any = replicated(mesh)
      if cuts(mesh):
        where = placements(jax.eval_shape(function, *args), mesh)
      return jax.jit(function, out_shardings=where)(*args)

    return create

  return transform


class _CutParam(nnx.Param):
  """A parameter that is gathered where it is read: `place` is its sharding without `fsdp`."""

  place: NamedSharding

  def get_value(self, *, index: Any = ...) -> Any:
    x = jax.lax.with_sharding_constraint(super().get_value(), self.place)
    x = checkpoint_name(x, GATHERED)
    return x if index is ... else x[index]


def gather_in_use(model: nnx.Module, mesh: Mesh | AbstractMesh) -> None:
  """Has a model inside a jitted function gather its parameters over `fsdp`, each where it is read.

  Left to itself the partitioner cuts some activations as the weight before them is cut, and gathers
  the batch instead of the weight. What is read inside jax.checkpoint is gathered again for the
  gradient, and not kept.
  """
  for path, module in nnx.iter_modules(model):
    for name, variable in list(vars(module).items()):
      if not isinstance(variable, nnx.Variable):
        continue
      x = variable.get_value()
      axes = spec(".".join(map(str, (*path, name))), x.shape, mesh)
      if "fsdp" in axes:
        rest = PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes))
        setattr(module, name, _CutParam(x, place=NamedSharding(mesh, rest)))


def gathered_again(function: Callable, mesh: Mesh | AbstractMesh | None) -> Callable:
  """`function` whose gradient gathers the parameters of `gather_in_use` anew and keeps all else.

  Kept from the forward to the backward pass, they would be whole on every device. JAX applies the
  policy to what stands inside another jax.checkpoint, too, which would then save nothing: a
  function that has some is better left as it is.
  """
  if mesh is None or mesh.shape["fsdp"] == 1:
    return function
  policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
  return jax.checkpoint(function, policy=policy)


def cuts(mesh: Mesh | AbstractMesh) -> bool:
  """Whether parameters are cut on this mesh at all."""
  return mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
  """The first dimension cut over `data` and `fsdp`: batches."""
  return NamedSharding(mesh, _BATCH)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of the global batch that this process's devices hold, in order.

  Processes of one `data` and `fsdp` index (tensor across hosts) share rows, others do not. On a TPU
  slice they need not be neighbours: the mesh follows the wires, not the hosts.
  """
  indices = over_data(mesh).addressable_devices_indices_map((batch_size,)).values()
  return sorted({row for (part,) in indices for row in range(batch_size)[part]})


def filled(rows: np.ndarray, size: int) -> np.ndarray:
  """`size` rows, the last one repeated: a batch of the one shape that is compiled."""
  rows = np.asarray(rows)
  return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows (`local_rows`) of a batch -> global arrays [B, ...] on the mesh."""
  sharding = over_data(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put(tree: Any, mesh: Mesh) -> Any:
  """Arrays that every process holds whole -> the same on the mesh, cut by RULES."""
  return jax.tree.map(_put, tree, placements(tree, mesh))


def put_replicated(tree: Any, mesh: Mesh) -> Any:
  """The same pytree whole on every device of the mesh."""
  return jax.device_put(tree, replicated(mesh))


def gathered(tree: Any) -> Any:
  """Whole numpy arrays on every process; where there are several, all of them must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
  if jax.process_count() == 1:
    return jax.device_put(array, sharding)
  # device_put would compare the array between the processes first, value by value.
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


# What became of it.


def whole_though_cut(tree: Any, mesh: Mesh | AbstractMesh) -> tuple[int, dict[str, int]]:
  """(bytes that RULES should cut, path -> bytes of those of them that lie whole along an axis).

  Looks at the arrays' own shardings, whoever placed them; `tree` may hold placed abstract arrays.
  """
  total, whole = 0, {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    rule = _rule(_name(path), None)
    wanted = _wanted(rule, mesh)
    if not wanted or x.size < rule.above:
      continue
    total += x.size * x.dtype.itemsize
    if not wanted.keys() <= set(jax.tree.leaves(tuple(x.sharding.spec))):
      whole[_name(path)] = x.size * x.dtype.itemsize
  return total, whole


def check(tree: Any, mesh: Mesh | AbstractMesh) -> None:
  """Raises UserError if more than MAX_WHOLE of the bytes that RULES should cut are not."""
  total, whole = whole_though_cut(tree, mesh)
  share = sum(whole.values()) / max(total, 1)
  if share > MAX_WHOLE:
    names = sorted(whole, key=lambda name: -whole[name])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    sizes = ", ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in AXES[1:])
    raise UserError(
      f"{share:.0%} of the bytes that should be cut lie whole on every device ({sizes}): "
      f"{', '.join(names[:3])}{more}; choose sizes that divide these shapes"
    )


def describe(parts: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> str:
  """The table of what is cut how: a row for each network of each part and each kind of cut.

  Args:
    parts: name -> tree of placed arrays, e.g. {'trained': ..., 'frozen': ...}.
  """
  groups: dict[tuple[str, str, str], list[float]] = {}
  for part, tree in parts.items():
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
      network = _name(path).replace("/", ".").split(".")[0] if isinstance(tree, dict) else "all"
      axes = jax.tree.leaves(tuple(x.sharding.spec))
      row = groups.setdefault((part, network, " x ".join(sorted(axes)) or "whole"), [0, 0, 0])
      itemsize = x.dtype.itemsize
      local = math.prod(x.sharding.shard_shape(x.shape)) * itemsize
      for i, value in enumerate((1, x.size * itemsize, local)):
        row[i] += value
  rows = [("part", "network", "cut over", "arrays", "MiB", "MiB a device")]
  rows += [
    (*key, str(n), f"{size / 2**20:,.1f}", f"{local / 2**20:,.1f}")
    for key, (n, size, local) in groups.items()
  ]
  size, local = (sum(row[i] for row in groups.values()) / 2**20 for i in (1, 2))
  rows.append(("all", "", "", "", f"{size:,.1f}", f"{local:,.1f}"))
  return align(rows, left=3)


def _rule(path: str, rules: Sequence[Rule] | None) -> Rule:
  return next(rule for rule in rules or RULES if re.search(rule.pattern, path))


def _wanted(rule: Rule, mesh: Mesh | AbstractMesh) -> dict[str, int | None]:
  """The rule's axes that the mesh has more than one device along."""
  return {axis: d for axis, d in rule.axes.items() if mesh.shape.get(axis, 1) > 1}


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
