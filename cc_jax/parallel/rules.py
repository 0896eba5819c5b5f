"""The processes, the mesh, and what lies where on it.

The batch is cut over `data` and `fsdp`, parameters with their optimizer and average over `fsdp` and
`tensor` by RULES; what no rule cuts lies whole on every device. The only file that knows how many
devices and processes there are. Axes are made `Auto`: XLA's partitioner reads the placement of a
jitted function's arguments and inserts the collectives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cc_jax.models.params import path_name
from cc_jax.parallel.mesh import replicated_sharding


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


# Placements.


def param_spec(
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


def param_shardings(
  tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] | None = None
) -> Any:
  """Where RULES lay every array of a tree (arrays, tracers or ShapeDtypeStructs): NamedShardings.

  Works with a mesh of a topology that is only compiled for and with an AbstractMesh, too.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, param_spec(path_name(path), x.shape, mesh, rules)), tree
  )


def abstract_params(tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] | None = None) -> Any:
  """Abstract arrays with their placements: arguments to compile for without any data."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    tree,
    param_shardings(tree, mesh, rules),
  )


def param_sharding_fn(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """(path, shape) -> placement: what `hub.load_base` asks for each tensor that it reads."""
  return lambda path, shape: NamedSharding(mesh, param_spec(path, shape, mesh))


def init_sharded(mesh: Mesh) -> Callable[[Callable], Callable]:
  """jax.jit for functions that make parameters: each device makes what it is going to hold."""

  def transform(function: Callable) -> Callable:
    def create(*args):
      where: Any = replicated_sharding(mesh)
      if shards_params(mesh):
        where = param_shardings(jax.eval_shape(function, *args), mesh)
      return jax.jit(function, out_shardings=where)(*args)

    return create

  return transform


def shards_params(mesh: Mesh | AbstractMesh) -> bool:
  """Whether parameters are cut on this mesh at all."""
  return mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1


def shard_params(tree: Any, mesh: Mesh) -> Any:
  """Arrays that every process holds whole -> the same on the mesh, cut by RULES."""
  return jax.tree.map(_shard_array, tree, param_shardings(tree, mesh))


def _shard_array(array: Any, sharding: NamedSharding) -> jax.Array:
  if jax.process_count() == 1:
    return jax.device_put(array, sharding)
  # device_put would compare the array between the processes first, value by value.
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _rule(path: str, rules: Sequence[Rule] | None) -> Rule:
  return next(rule for rule in rules or RULES if re.search(rule.pattern, path))


def _wanted(rule: Rule, mesh: Mesh | AbstractMesh) -> dict[str, int | None]:
  """The rule's axes that the mesh has more than one device along."""
  return {axis: d for axis, d in rule.axes.items() if mesh.shape.get(axis, 1) > 1}
