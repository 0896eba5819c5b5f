"""Our parameters under PyTorch's names and in PyTorch's layouts, and back. Numpy only.

Modules carry PyTorch's attribute names, so that only a parameter's last name and its layout change:

  ours                 PyTorch   layout
  kernel [I, O]        weight    [O, I]            linear
  kernel [H, W, I, O]  weight    [O, I, H, W]      convolution
  scale, embedding     weight    the same          norms, tables
  anything else        the same  the same          bias, bare parameters

Both directions are strict: every tensor is used, none is missing, shapes agree.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from cc_jax.errors import UserError, first_names


def torch_name(path: Iterable[str | int]) -> str:
  """`('to_out', 0, 'kernel')` -> `'to_out.0.weight'`."""
  *parents, last = path
  renamed = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)
  return ".".join(map(str, (*parents, renamed)))


def torch_shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor that a PyTorch checkpoint of `state` holds."""
  return {
    torch_name(path): _torch_shape(path, variable.shape)
    for path, variable in nnx.to_flat_state(state)
  }


def to_torch(state: nnx.State) -> dict[str, np.ndarray]:
  """The tensors of `state` as a PyTorch checkpoint names and lays them out (host memory)."""
  return {
    torch_name(path): _to_torch_layout(path, np.asarray(variable.get_value()))
    for path, variable in nnx.to_flat_state(state)
  }


def from_torch(
  tensors: Mapping[str, Any], abstract_state: nnx.State, *, what: str = "these weights",
  place: Callable[[tuple, np.ndarray, Any], Any] | None = None,
) -> nnx.State:
  """Fills a state of `abstract_state`'s structure with PyTorch's tensors.

  Args:
    tensors: name -> array. May be lazy: each tensor is taken once, placed, and let go.
    abstract_state: the `nnx.state` of an `nnx.eval_shape` model (or of a real one).
    what: names the source in error messages, e.g. the file's path.
    place: `place(path, array, variable)` puts an array, already in our layout, on a device; by
      default as a jax array in the dtype of the abstract `variable`.

  Raises:
    UserError: a tensor is missing, left over, has another shape, or no floating numbers; the first
      such are named.
  """
  place = place or (lambda path, array, variable: jnp.asarray(array, variable.dtype))
  variables = dict(nnx.to_flat_state(abstract_state))
  _require_equal_names(map(torch_name, variables), set(tensors.keys()), what)

  filled = []
  for path, variable in variables.items():
    name = torch_name(path)
    array = np.asarray(tensors[name])
    wanted = _torch_shape(path, variable.shape)
    if array.shape != wanted:
      raise UserError(
        f"{what} belong to another architecture: {name} has the shape {array.shape},"
        f" the config asks for {wanted}; use the config.json that was saved with the weights"
      )
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise UserError(
        f"{what} are quantised: {name} is stored as {array.dtype}; take their float16 version"
      )
    array = _from_torch_layout(path, array)
    filled.append((path, variable.replace(place(path, array, variable))))
  return nnx.from_flat_state(filled)


def _require_equal_names(ours: Iterable[str], theirs: set[str], what: str) -> None:
  ours = set(ours)
  problems = [
    f"{len(names)} {label} ({first_names(sorted(names))})"
    for label, names in (("missing", ours - theirs), ("not expected", theirs - ours))
    if names
  ]
  if problems:
    raise UserError(
      f"{what} belong to another architecture: {'; '.join(problems)};"
      " use the config.json that was saved with the weights"
    )


def _torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
  if path[-1] != "kernel":
    return tuple(shape)
  *window, inputs, outputs = shape
  return (outputs, inputs, *window)


def _to_torch_layout(path: tuple, array: np.ndarray) -> np.ndarray:
  if path[-1] != "kernel":
    return array
  window = range(array.ndim - 2)
  return np.ascontiguousarray(array.transpose(array.ndim - 1, array.ndim - 2, *window))


def _from_torch_layout(path: tuple, array: np.ndarray) -> np.ndarray:
  if path[-1] != "kernel":
    return array
  window = range(2, array.ndim)
  return array.transpose(*window, 1, 0)
