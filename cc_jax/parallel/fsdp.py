"""Parameters sharded over `fsdp`: gathered where a network reads them, again for the gradient."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from cc_jax.parallel.rules import param_spec

GATHERED = "gathered over fsdp"


class _ShardedParam(nnx.Param):
  """A parameter that is gathered where it is read."""

  gathered: NamedSharding  # its sharding without `fsdp`

  def get_value(self, *, index: Any = ...) -> Any:
    x = jax.lax.with_sharding_constraint(super().get_value(), self.gathered)
    x = checkpoint_name(x, GATHERED)
    return x if index is ... else x[index]


def all_gather_on_use(model: nnx.Module, mesh: Mesh | AbstractMesh) -> None:
  """Makes a model inside a jitted function gather its parameters over `fsdp` as they are read.

  Otherwise the partitioner shards some activations like the weight before them, and gathers the
  batch instead of the weight. What is read inside jax.checkpoint is gathered again for the gradient
  and not kept.
  """
  for path, module in nnx.iter_modules(model):
    for name, variable in list(vars(module).items()):
      if not isinstance(variable, nnx.Variable):
        continue
      x = variable.get_value()
      axes = param_spec(".".join(map(str, (*path, name))), x.shape, mesh)
      if "fsdp" in axes:
        spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in axes))
        setattr(module, name, _ShardedParam(x, gathered=NamedSharding(mesh, spec)))


def remat_all_gathers(function: Callable, mesh: Mesh | AbstractMesh | None) -> Callable:
  """`function`, whose gradient gathers the parameters of `all_gather_on_use` again.

  Kept from the forward to the backward pass they would be replicated. JAX applies the policy inside
  another jax.checkpoint, too, which would then save no memory: do not use this around one.
  """
  if mesh is None or mesh.shape["fsdp"] == 1:
    return function
  policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
  return jax.checkpoint(function, policy=policy)
