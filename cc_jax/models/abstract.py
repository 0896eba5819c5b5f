"""Networks without their arrays."""

from collections.abc import Callable
from typing import TypeVar

from flax import nnx

from cc_jax.models.keys import StatelessRngs

Module = TypeVar("Module", bound=nnx.Module)


def abstract(construct: Callable[[StatelessRngs], Module]) -> Module:
  """The module that `construct(rngs)` makes, with shapes and dtypes in place of its arrays."""
  return nnx.eval_shape(lambda: construct(StatelessRngs(0)))
