"""Initialising modules: random keys without the state of nnx.Rngs, and without any arrays."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)

_BLOCK = 512  # keys


class StatelessRngs:
  """Takes the place of `nnx.Rngs(seed)` in constructors: each `keys.params()` is a new key.

  The count of nnx.Rngs is an nnx variable, and under `nnx.eval_shape` flax 0.12 looks through the
  whole trace whenever it grows: SDXL's UNet takes 44 s. With a Python number for a count, 2.4 s.
  The keys are fold_in(key, 1), fold_in(key, 2) and so on, derived many at once: XLA compiles each
  derivation on its own as long as the drawing itself.
  """

  def __init__(self, seed: int | jax.Array):
    self._key = jax.random.key(seed)
    self._count = 0
    self._keys: list[jax.Array] = []

  def params(self) -> jax.Array:
    if self._count == _BLOCK * len(self._keys):
      counts = self._count + 1 + jnp.arange(_BLOCK)
      self._keys.append(jax.vmap(jax.random.fold_in, (None, 0))(self._key, counts))
    block, row = divmod(self._count, _BLOCK)
    self._count += 1
    return self._keys[block][row]


def abstract(construct: Callable[[StatelessRngs], Module]) -> Module:
  """The module that `construct(rngs)` makes, with shapes and dtypes in place of its arrays."""
  return nnx.eval_shape(lambda: construct(StatelessRngs(0)))
