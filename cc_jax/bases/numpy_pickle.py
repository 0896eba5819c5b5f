"""A pickle of numpy arrays in dicts, read so that it can make nothing else."""

import io
import pickle
from typing import Any

import numpy as np

from cc_jax.errors import UserError, one_line

# What a pickled array names. numpy 2 has moved the first; files of 2022 have the old place.
_ALLOWED = {
  ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
  ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
  """Refuses to find anything but numpy arrays, before it is called."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      raise pickle.UnpicklingError(f"it names {module}.{name}, which is no numpy array")
    return _ALLOWED[module, name]


def read_arrays(data: bytes, what: str = "the file") -> dict[str, np.ndarray]:
  """Nested dicts of float arrays, flattened: {"a": {"b": x}} becomes {"a.b": x}.

  Raises:
    UserError: it names anything but numpy arrays (which could run code), breaks off, or holds
      something else than dicts of float arrays.
  """
  try:
    tree = _ArraysOnly(io.BytesIO(data)).load()
  except Exception as error:  # pickle's own errors are of many kinds
    raise UserError(f"{what} is not read: {one_line(error)}; get it again") from error
  arrays: dict[str, np.ndarray] = {}
  _flatten(tree, (), arrays, what)
  return arrays


def _flatten(tree: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray], what: str) -> None:
  if type(tree) is dict:
    for key, value in tree.items():
      _flatten(value, (*path, str(key)), arrays, what)
  elif isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
    arrays[".".join(path)] = tree
  else:
    raise UserError(f"{what}: {'.'.join(path) or 'the top'} is no float array; get it again")
