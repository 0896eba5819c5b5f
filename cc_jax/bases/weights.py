"""One network and its tensors in safetensors files: reading and writing, strict in both directions.

Every tensor must be used and every parameter found, with equal shapes; pickles are refused. Tensors
are read one by one, straight into the wanted dtype and onto their devices, so loading needs little
memory beyond the network itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from cc_jax.bases.torch_names import from_torch, to_torch
from cc_jax.errors import UserError, one_line

Module = TypeVar("Module", bound=nnx.Module)
Convert = Callable[[np.ndarray], np.ndarray]
# (dotted path of a parameter, its shape in our layout) -> where it shall lie; None = the default.
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]

_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")


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
    UserError: nothing there, unreadable, a pickle, or other names or shapes than the module's.
  """
  graph, params, rest = nnx.split(module, nnx.Param, ...)

  def place(path: tuple, array: np.ndarray, variable: nnx.Variable) -> jax.Array:
    array = array.astype(variable.dtype, copy=False)
    target = sharding and sharding(".".join(map(str, path)), array.shape)
    if target is None:
      return jnp.asarray(array)
    # Of several processes each takes its part, which device_put would first compare between them.
    return jax.make_array_from_callback(array.shape, target, lambda index: array[index])

  with contextlib.ExitStack() as stack:
    tensors = source
    if not isinstance(source, Mapping):
      what = what or f"the weights in {source}"
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


class Tensors(Mapping[str, np.ndarray]):
  """Tensors of open files, read when asked for and not kept."""

  def __init__(self, where: dict[str, tuple[Any, str, Convert | None]], metadata: dict[str, str]):
    """`where`: name -> (open file, name in that file, what is done to the tensor)."""
    self._where = where
    self.metadata = metadata

  def __getitem__(self, name: str) -> np.ndarray:
    file, stored, convert = self._where[name]
    try:
      tensor = file.get_tensor(stored)
    except (safetensors.SafetensorError, TypeError, ValueError, AttributeError) as error:
      reason = one_line(error)
      raise UserError(f"{stored} cannot be read ({reason}); convert it to float16") from error
    return tensor if convert is None else convert(tensor)

  def __iter__(self) -> Iterator[str]:
    return iter(self._where)

  def __len__(self) -> int:
    return len(self._where)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """What the files' headers say; nothing is read or converted."""
    return {
      name: tuple(file.get_slice(stored).get_shape())
      for name, (file, stored, _) in self._where.items()
    }

  def select(self, entries: Mapping[str, tuple[str, Convert | None]]) -> Tensors:
    """Other names for some of these tensors: new name -> (present name, conversion)."""
    where = {}
    for name, (present, convert) in entries.items():
      file, stored, before = self._where[present]
      assert before is None or convert is None, name
      where[name] = (file, stored, convert or before)
    return Tensors(where, self.metadata)


def open_tensors(path: str | Path, stack: contextlib.ExitStack) -> Tensors:
  """The tensors of a safetensors file, or of the files in a folder, under their stored names.

  Raises:
    UserError: nothing there, unreadable, a pickle, or a name that two files have.
  """
  path = Path(path)
  where: dict[str, tuple[Any, str, None]] = {}
  metadata: dict[str, str] = {}
  for name in [path] if path.is_file() else _weight_files(path):
    file = _open(name, stack)
    metadata |= file.metadata() or {}
    for stored in file.keys():  # noqa: SIM118 (no mapping)
      if stored in where:
        raise UserError(f"{name} has {stored}, which another file beside it has too; keep one")
      where[stored] = (file, stored, None)
  return Tensors(where, metadata)


class TensorWrapper(Mapping[str, np.ndarray]):
  """Tensors of the same names, to which a subclass does something as each is read."""

  def __init__(self, tensors: Mapping[str, np.ndarray]):
    self._tensors = tensors

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)


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


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
  refuse_pickle(file)
  try:
    return stack.enter_context(safetensors.safe_open(file, "numpy"))
  except (safetensors.SafetensorError, OSError) as error:
    reason = one_line(error)
    raise UserError(f"{file} is truncated or not safetensors ({reason}); get it again") from error


def refuse_pickle(file: Path, tensors: str = "torch.load(old, weights_only=True)") -> None:
  """Raises UserError, with the way to convert it, for a file in one of PyTorch's own formats.

  `tensors`: how PyTorch gets name -> tensor from such a file; a .ckpt has more than its tensors.
  """
  if file.suffix in _PICKLES:
    tensors += "['state_dict']" if file.suffix == ".ckpt" else ""
    raise UserError(
      f"{file} is a pickle, which can run code; take its .safetensors version, or convert it where "
      f"PyTorch is: safetensors.torch.save_file({tensors}, new)"
    )


def _weight_files(folder: Path) -> list[Path]:
  if not folder.is_dir():
    raise UserError(f"{folder} is missing; a base is a folder in the diffusers layout")
  for stem in _STEMS:
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
      if (folder / name).is_file():
        return [folder / name]
    for index in (folder / f"{stem}.safetensors.index{v}.json" for v in ("", ".fp16")):
      if index.is_file():
        return _shards(index)
  for file in sorted(folder.iterdir()):
    refuse_pickle(file)
  raise UserError(f"{folder / _STEMS[0]}.safetensors (or {_STEMS[1]}.safetensors) is missing")


def _shards(index: Path) -> list[Path]:
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, AttributeError) as error:
    raise UserError(f"{index} is no index of weight files; get it again") from error
  for name in names:
    if not (index.parent / name).is_file():
      raise UserError(f"{index.parent / name}, named in {index.name}, is missing; get it again")
  return [index.parent / name for name in names]
