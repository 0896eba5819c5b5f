"""One network and its tensors in safetensors files: reading and writing, strict in both directions.

Every tensor must be used and every parameter found, with equal shapes; pickles are refused. Tensors
are read one by one, straight into the wanted dtype and onto their devices, so loading needs little
memory beyond the network itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from cc_jax.bases.tensor_files import Convert, Tensors, TensorWrapper, open_tensors
from cc_jax.bases.torch_names import from_torch, to_torch, torch_name
from cc_jax.errors import UserError

Module = TypeVar("Module", bound=nnx.Module)
# (dotted path of a parameter, its shape in our layout) -> where it shall lie; None = the default.
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def load_weights(
  module: Module, source: str | Path | Mapping[str, np.ndarray], *,
  digests: dict[str, str] | None = None,
  change: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = lambda tensors: tensors,
  sharding: Sharding | None = None, what: str = "",
) -> Module:
  """Returns `module` with the parameters that are stored at `source`.

  Args:
    module: real or abstract (nnx.eval_shape); its parameters' dtypes are the wanted ones. Its class
      may have the static methods `hub_name(name) -> str | None`, which turns names of other files
      into ours (None says that a tensor is no parameter), and `hub_tensor(name, array)`, which does
      the same for shapes.
    source: a safetensors file, a folder that holds one under the hub's names, perhaps in shards, or
      the tensors themselves under our names in PyTorch's layout, which may be lazy.
    digests: receives, for each of our names, a hash of the tensor's dtype, shape and stored bytes.
    change: what happens to the tensors after they were hashed (a LoRA is merged).
    sharding: for each parameter (dotted path as in `nnx.to_flat_state`) where it shall lie.
    what: names the source in error messages; default its path.

  Raises:
    UserError: nothing there, unreadable, a pickle, other names or shapes than the module's, or
      numbers that are not finite.
  """
  graph, params, rest = nnx.split(module, nnx.Param, ...)

  def place(path: tuple, array: np.ndarray, variable: nnx.Variable) -> jax.Array:
    with np.errstate(over="ignore"):  # an error follows
      array = array.astype(variable.dtype, copy=False)
    if not np.isfinite(array).all():
      raise UserError(
        f"{what or 'these weights'}: {torch_name(path)} is not finite (NaN or infinity) as "
        f"{array.dtype}; get them again"
      )
    target = sharding and sharding(".".join(map(str, path)), array.shape)
    if target is None:
      return jnp.asarray(array)
    # Of several processes each takes its part, which device_put would first compare between them.
    return jax.make_array_from_callback(array.shape, target, lambda index: array[index])

  if not isinstance(source, Mapping):
    what = what or f"the weights in {source}"
  with contextlib.ExitStack() as stack:
    tensors = source
    if not isinstance(source, Mapping):
      tensors = _named_as_ours(open_tensors(source, stack), type(module))
    tensors = change(tensors if digests is None else _Hashed(tensors, digests))
    params = from_torch(tensors, params, what=what or "these weights", place=place)
  return nnx.merge(graph, params, rest)


def save_weights(module: nnx.Module, path: str | Path, *, dtype: Any = None) -> None:
  """Writes a module's parameters under PyTorch's names; the file appears whole or not at all.

  Args:
    dtype: what to store, e.g. 'float16'; None keeps each parameter's own.

  Raises:
    ValueError: a value is not finite, or does not fit `dtype`.
    UserError: the file cannot be written.
  """
  tensors = to_torch(nnx.state(module, nnx.Param))
  for name, value in tensors.items():
    with np.errstate(over="ignore"):
      value = value if dtype is None else value.astype(jnp.dtype(dtype))
    if not np.isfinite(value.astype(np.float32)).all():
      raise ValueError(f"{name} is not finite as {value.dtype}; not saved")
    # safetensors writes the memory as it lies, so a transposed view would be stored scrambled.
    tensors[name] = np.ascontiguousarray(value)
  with replacing(Path(path)) as temporary:
    # The metadata is what transformers asks for before it reads a file.
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yields a temporary name beside `path`, which takes its place when the block succeeds."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    yield temporary
    temporary.chmod(mode)  # safetensors makes files that only their owner can read
    os.replace(temporary, path)
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f"{path} cannot be written: {reason}; choose another") from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


class _Hashed(TensorWrapper):
  """The same tensors, noting a hash of each that is read."""

  def __init__(self, tensors: Mapping[str, np.ndarray], digests: dict[str, str]):
    super().__init__(tensors)
    self._digests = digests

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}\n".encode())
    digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
    self._digests[name] = digest.hexdigest()
    return tensor


def _named_as_ours(tensors: Tensors, cls: type[nnx.Module]) -> Tensors:
  rename = getattr(cls, "hub_name", lambda name: name)
  reshape = getattr(cls, "hub_tensor", None)
  entries: dict[str, tuple[str, Convert | None]] = {}
  for stored in tensors:
    name = rename(stored)
    if name in entries:
      raise UserError(f"the weights have {name} twice, as {entries[name][0]} and {stored}")
    if name is not None:
      convert = reshape and (lambda array, name=name: reshape(name, array))
      entries[name] = (stored, convert)
  return tensors.select(entries)
