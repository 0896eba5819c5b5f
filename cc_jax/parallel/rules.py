"""How parameters are sharded: a table of rules by their paths, and the shardings that follow.

RULES shard parameters, their optimizer state and EMA over `fsdp` and `tensor`; what no rule shards
is replicated. Axes are `Auto`: XLA's partitioner reads the shardings of a jitted function's
arguments and inserts the collectives.
"""

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
  """How parameters with a matching path are sharded."""

  pattern: str  # a regular expression, searched in the path
  # Axis of the mesh -> the dimension to shard; None = the largest that divides and is not sharded.
  axes: Mapping[str, int | None]
  min_size: int = 2**16  # elements; smaller parameters are replicated


# The first matching rule applies. `tensor` shards in Megatron's pairs (arXiv 1909.08053, section
# 3): heads, hidden width or channels of the first product, over which the second one sums.
RULES = (
  Rule(
    r"\b(to_[qkv](_visual)?|[qkv]_proj|ff_in|fc1|net\.0\.proj|conv1)\.kernel$",
    {"tensor": -1, "fsdp": None},
  ),
  Rule(r"\b(to_out(\.0)?|out_proj|ff_out|fc2|net\.2|conv2)\.kernel$", {"tensor": -2, "fsdp": None}),
  Rule("", {"fsdp": None}),
)


def find_rule(path: str) -> Rule:
  return next(rule for rule in RULES if re.search(rule.pattern, path))


def axes_in_use(rule: Rule, mesh: Mesh | AbstractMesh) -> dict[str, int | None]:
  """The rule's axes along which the mesh has more than one device."""
  return {axis: d for axis, d in rule.axes.items() if mesh.shape.get(axis, 1) > 1}


def param_spec(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """How RULES shard a parameter; an axis shards no dimension that it does not divide."""
  rule = find_rule(path)
  parts: list[str | None] = [None] * len(shape)
  if math.prod(shape) < rule.min_size:
    return PartitionSpec()
  for axis, dimension in axes_in_use(rule, mesh).items():
    order = sorted(range(len(shape)), key=lambda d: (shape[d], d), reverse=True)
    if dimension is not None:
      order = [len(shape) + dimension] if -dimension <= len(shape) else []
    for d in order:
      if parts[d] is None and shape[d] % mesh.shape[axis] == 0:
        parts[d] = axis
        break
  return PartitionSpec(*parts) if any(parts) else PartitionSpec()


def param_sharding_fn(mesh: Mesh | AbstractMesh) -> Callable[[str, Sequence[int]], NamedSharding]:
  """(path, shape) -> sharding by RULES, for `load_base`, which reads tensor by tensor."""
  return lambda path, shape: NamedSharding(mesh, param_spec(path, shape, mesh))


def param_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
  """The sharding by RULES of every array of a tree (arrays, tracers or ShapeDtypeStructs)."""
  sharding = param_sharding_fn(mesh)
  return jax.tree_util.tree_map_with_path(lambda path, x: sharding(path_name(path), x.shape), tree)


def abstract_params(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
  """Abstract arrays with their shardings: arguments to compile for without any data."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree,
    param_shardings(tree, mesh),
  )


def init_sharded(mesh: Mesh) -> Callable[[Callable], Callable]:
  """jax.jit for functions that create parameters: each device creates its own shards."""

  def transform(function: Callable) -> Callable:
    def create(*args):
      shardings: Any = replicated_sharding(mesh)
      if shards_params(mesh):
        shardings = param_shardings(jax.eval_shape(function, *args), mesh)
      return jax.jit(function, out_shardings=shardings)(*args)

    return create

  return transform


def shards_params(mesh: Mesh | AbstractMesh) -> bool:
  """Whether the mesh has axes over which parameters are sharded."""
  return mesh.shape["fsdp"] > 1 or mesh.shape["tensor"] > 1


def shard_params(tree: Any, mesh: Mesh) -> Any:
  """Arrays that are complete in every process -> the same on the mesh, sharded by RULES."""
  return jax.tree.map(_shard_array, tree, param_shardings(tree, mesh))


def _shard_array(array: Any, sharding: NamedSharding) -> jax.Array:
  if jax.process_count() == 1:
    return jax.device_put(array, sharding)
  # device_put would compare the array between the processes first, value by value.
  array = np.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
