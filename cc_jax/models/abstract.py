"""Building a network without its arrays, or inside jit, in seconds even at SDXL's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


class Keys:
  """What constructors use of `nnx.Rngs`, `rngs.params()`, with a counter that is a Python number.

  Under a trace every key of `nnx.Rngs` updates a traced counter, and the way flax 0.12.8 does that
  makes JAX search all equations traced so far: 83 s for SDXL's 1680 tensors, against 3 s.
  """

  def __init__(self, seed: int | jax.Array):
    self._key = jax.random.key(seed) if isinstance(seed, int) else seed
    self._count = 0

  def params(self) -> jax.Array:
    self._count += 1
    return jax.random.fold_in(self._key, self._count)


def abstract(construct: Callable[[Keys], Module]) -> Module:
  """The module that `construct(rngs)` makes, with shapes and dtypes in place of its arrays."""
  return nnx.eval_shape(lambda: construct(Keys(0)))
