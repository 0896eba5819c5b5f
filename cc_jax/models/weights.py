"""One network and its safetensors file: reading and writing, strict in both directions.

Every tensor of the file must be used and every parameter found, with equal shapes; pickles are
refused. Tensors are read one by one, straight into the wanted dtype, so loading needs little memory
beyond the network itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from cc_jax.errors import UserError
from cc_jax.models.torch_names import from_torch, to_torch

Module = TypeVar("Module", bound=nnx.Module)

_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")


def load_weights(
  module: Module, path: str | Path, *, digests: dict[str, str] | None = None
) -> Module:
  """Returns `module` with the parameters that are stored at `path`.

  Args:
    module: real or abstract (nnx.eval_shape); its parameters' dtypes are the wanted ones. Its class
      may have a static `hub_name(name) -> str | None` that turns names of other files into ours;
      None says that a tensor is no parameter.
    path: a safetensors file, or a folder that holds one under the hub's names, perhaps in shards.
    digests: receives, for each of our names, a hash of the tensor's dtype, shape and stored bytes.

  Raises:
    UserError: nothing there, unreadable, a pickle, or other names or shapes than the module's.
  """
  path = Path(path)
  graph, params, rest = nnx.split(module, nnx.Param, ...)
  with contextlib.ExitStack() as stack:
    tensors = _Tensors(
      [_open(file, stack) for file in ([path] if path.is_file() else _weight_files(path))],
      getattr(type(module), "hub_name", lambda name: name),
      digests,
    )
    params = from_torch(tensors, params, what=f"the weights in {path}")
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


class _Tensors(Mapping[str, np.ndarray]):
  """The tensors of open files under our names, read when asked for."""

  def __init__(
    self,
    files: list[Any],
    rename: Callable[[str], str | None],
    digests: dict[str, str] | None,
  ):
    self._digests = digests
    self._where: dict[str, tuple[Any, str]] = {}
    for file in files:
      for stored in file.keys():
        name = rename(stored)
        if name in self._where:
          raise UserError(f"the weights have {name} twice, as {self._where[name][1]} and {stored}")
        if name is not None:
          self._where[name] = (file, stored)

  def __getitem__(self, name: str) -> np.ndarray:
    file, stored = self._where[name]
    tensor = file.get_tensor(stored)
    if self._digests is not None:
      digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}\n".encode())
      digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
      self._digests[name] = digest.hexdigest()
    return tensor

  def __iter__(self) -> Iterator[str]:
    return iter(self._where)

  def __len__(self) -> int:
    return len(self._where)


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
  if file.suffix in _PICKLES:
    raise UserError(f"{file} is a pickle, which can run code; convert it to safetensors")
  try:
    return stack.enter_context(safetensors.safe_open(file, "numpy"))
  except (safetensors.SafetensorError, OSError) as error:
    reason = " ".join(str(error).split())
    raise UserError(f"{file} is truncated or not safetensors ({reason}); get it again") from error


def _weight_files(folder: Path) -> list[Path]:
  if not folder.is_dir():
    raise UserError(f"{folder} is missing; a base is a folder in the diffusers layout")
  for stem in _STEMS:
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
      if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
      shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
      for shard in shards:
        if not (folder / shard).is_file():
          raise UserError(f"{folder / shard}, named in {index.name}, is missing; get it again")
      return [folder / shard for shard in shards]
  pickles = sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
  if pickles:
    raise UserError(f"{pickles[0]} is a pickle, which can run code; convert it to safetensors")
  raise UserError(f"{folder / _STEMS[0]}.safetensors (or {_STEMS[1]}.safetensors) is missing")
