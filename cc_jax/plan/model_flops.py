"""FLOPs of a traced function: what its mathematics needs, the same on every backend.

Counted in the jaxpr, before XLA sees it: 2 for every multiplication with its addition in matrix
products and convolutions; products with padding and with the holes of dilated inputs do not count.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
from jax.interpreters import partial_eval

from cc_jax.plan.flops import position_pairs

# Parts of the names of primitives whose inner jaxprs are blocks of a grid, or that have none.
KERNELS = ("pallas_call", "dot_product_attention")  # the latter: cuDNN, forward and backward


def model_flops(function: Callable, *arguments: Any) -> int:
  """`jaxpr_flops` of a function at these arguments, or arrays of their shapes, on one device."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
  return jaxpr_flops(jax.make_jaxpr(function)(*shapes))


def jaxpr_flops(closed: jax.extend.core.ClosedJaxpr) -> int:
  """FLOPs of one run on all devices together, of what the results depend on.

  A scan counts as often as it runs, of several branches the most expensive one. A `while` loop
  counts once, since its trip count is not in the jaxpr. What `jax.checkpoint` computes again counts
  again: trace without it.

  Raises:
    ValueError: a kernel (Pallas, cuDNN) is in it, whose work is not.
  """
  live, *_ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return _flops(live)


def _flops(jaxpr: Any) -> int:
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot_flops(equation)
  if name == "conv_general_dilated":
    return _convolution_flops(equation)
  if any(word in name for word in KERNELS):
    raise ValueError(f"the FLOPs of {name} are not in the jaxpr; trace the function without it")
  inner = [_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
  if name == "cond":
    return max(inner)
  times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}
  return times.get(name, lambda: 1)() * sum(inner)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
  """The jaxprs among an equation's parameters."""
  values = [x for value in params.values()
            for x in (value if isinstance(value, tuple | list) else (value,))]  # fmt: skip
  values = [getattr(value, "jaxpr", value) for value in values]
  return [value for value in values if hasattr(value, "eqns")]


def _dot_flops(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  lhs = equation.invars[0].aval.shape
  return 2 * equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(equation: Any) -> int:
  """2 · batch · features out · features in (of a group) · pairs of (output, kernel) positions."""
  p = equation.params
  (lhs, rhs), out = (v.aval.shape for v in equation.invars), equation.outvars[0].aval.shape
  of_lhs, of_rhs, of_out = p["dimension_numbers"]
  pairs = 1
  for i, (before, _) in enumerate(p["padding"]):
    pairs *= position_pairs(
      size_in=lhs[of_lhs[2 + i]], size_out=out[of_out[2 + i]], kernel=rhs[of_rhs[2 + i]],
      stride=p["window_strides"][i], pad=before, lhs_dilate=p["lhs_dilation"][i],
      rhs_dilate=p["rhs_dilation"][i],
    )
  return 2 * out[of_out[0]] * out[of_out[1]] * rhs[of_rhs[1]] * pairs
