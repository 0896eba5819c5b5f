"""Parameters sharded over `fsdp`: gathered where a network reads them, and again for the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cc_jax.parallel.rules import param_spec

GATHERED = "gathered over fsdp"


class _ShardedParam(nnx.Param):
  """A parameter that is gathered where it is read: `place` is its sharding without `fsdp`."""

  place: NamedSharding

  def get_value(self, *, index: Any = ...) -> Any:
    x = jax.lax.with_sharding_constraint(super().get_value(), self.place)
    x = checkpoint_name(x, GATHERED)
    return x if index is ... else x[index]


def all_gather_on_use(model: nnx.Module, mesh: Mesh | AbstractMesh) -> None:
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
      axes = param_spec(".".join(map(str, (*path, name))), x.shape, mesh)
      if "fsdp" in axes:
        rest = PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes))
        setattr(module, name, _ShardedParam(x, place=NamedSharding(mesh, rest)))


def remat_all_gathers(function: Callable, mesh: Mesh | AbstractMesh | None) -> Callable:
  """`function` whose gradient gathers the parameters of `all_gather_on_use` anew and keeps all else.

  Kept from the forward to the backward pass, they would be whole on every device. JAX applies the
  policy to what stands inside another jax.checkpoint, too, which would then save nothing: a
  function that has some is better left as it is.
  """
  if mesh is None or mesh.shape["fsdp"] == 1:
    return function
  policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
  return jax.checkpoint(function, policy=policy)
