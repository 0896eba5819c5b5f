"""Initialising modules: random keys without the state of nnx.Rngs, and without any arrays."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


class StatelessRngs:
  """Takes the place of `nnx.Rngs(seed)` in constructors: each `keys.params()` is a new key.

  The count of nnx.Rngs is an nnx variable, and under `nnx.eval_shape` flax 0.12 looks through the
  whole trace whenever it grows: SDXL's UNet takes 44 s. With a Python number for a count, 2.4 s.
  """

  def __init__(self, seed: int | jax.Array):
    self._key = jax.random.key(seed)
    self._count = 0

  def params(self) -> jax.Array:
    self._count += 1
    return jax.random.fold_in(self._key, self._count)


def abstract(construct: Callable[[StatelessRngs], Module]) -> Module:
  """The module that `construct(rngs)` makes, with shapes and dtypes in place of its arrays."""
  return nnx.eval_shape(lambda: construct(StatelessRngs(0)))
