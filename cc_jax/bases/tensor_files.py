"""Safetensors files, one or the shards in a folder; pickles are refused.

Opening reads the headers only, so that shapes cost nothing; tensors are read one by one.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from cc_jax.errors import UserError, one_line

Convert = Callable[[np.ndarray], np.ndarray]
_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
_LFS = b"version https://git-lfs"
_FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # safetensors' names: numpy's
# Ends of keys in files whose float8 is to be multiplied by something.
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".comfy_quant")


class Tensors(Mapping[str, np.ndarray]):
  """Tensors of open files, read when asked for and not kept."""

  def __init__(self, where: dict[str, tuple[_File, str, Convert | None]], metadata: dict[str, str]):
    """`where`: name -> (open file, name in that file, what is done to the tensor)."""
    self._where = where
    self.metadata = metadata

  def __getitem__(self, name: str) -> np.ndarray:
    file, stored, convert = self._where[name]
    tensor = file.tensor(stored)
    return tensor if convert is None else convert(tensor)

  def __iter__(self) -> Iterator[str]:
    return iter(self._where)

  def __len__(self) -> int:
    return len(self._where)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """What the files' headers say; nothing is read or converted."""
    return {
      name: file.shape(stored) for name, (file, stored, _) in self._where.items()
    }

  def select(self, entries: Mapping[str, tuple[str, Convert | None]]) -> Tensors:
    """Other names for some of these tensors: new name -> (present name, conversion)."""
    where = {}
    for name, (present, convert) in entries.items():
      file, stored, before = self._where[present]
      assert before is None or convert is None, name
      where[name] = (file, stored, convert or before)
    return Tensors(where, self.metadata)


class _File:
  """An open file, which is not read; with float8, which safetensors does not read into numpy."""

  def __init__(self, path: Path, stack: contextlib.ExitStack):
    """Raises UserError: a pickle, unreadable, or quantised."""
    refuse_pickle(path)
    try:
      self._file = stack.enter_context(safetensors.safe_open(path, "numpy"))
    except (safetensors.SafetensorError, OSError) as error:
      with open(path, "rb") as file:
        pointer = file.read(len(_LFS)) == _LFS
      if pointer:
        raise UserError(f"{path} is Git LFS' pointer to the file; run `git lfs pull`") from error
      reason = one_line(error)
      raise UserError(f"{path} is truncated or not safetensors ({reason}); get it again") from error
    self.path, self.names = path, tuple(self._file.keys())
    self.metadata = self._file.metadata() or {}
    scale = next((name for name in self.names if name.endswith(_SCALES)), None)
    if scale and any(self._kind(name).startswith("F8") for name in self.names):
      raise UserError(
        f"{path} is scaled float8 ({scale}), which we do not read; take its float16 version"
      )

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._file.get_slice(name).get_shape())

  def tensor(self, name: str) -> np.ndarray:
    kind = self._kind(name)
    try:
      return self._float8(name, kind) if kind in _FLOAT8 else self._file.get_tensor(name)
    except (safetensors.SafetensorError, TypeError, ValueError, AttributeError, OSError) as error:
      raise UserError(
        f"{self.path}: {name} is {kind} and cannot be read ({one_line(error)}); convert it to "
        "float16"
      ) from error

  def _kind(self, name: str) -> str:
    return self._file.get_slice(name).get_dtype()

  def _float8(self, name: str, kind: str) -> np.ndarray:
    start, header = self._header
    first, end = header[name]["data_offsets"]
    stored = np.fromfile(self.path, np.uint8, end - first, offset=start + first)
    return stored.view(jnp.dtype(_FLOAT8[kind])).reshape(self.shape(name))

  @functools.cached_property
  def _header(self) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the file says about each."""
    with open(self.path, "rb") as file:
      length = int.from_bytes(file.read(8), "little")
      return 8 + length, json.loads(file.read(length))


def open_tensors(path: str | Path, stack: contextlib.ExitStack) -> Tensors:
  """The tensors of a safetensors file, or of the files in a folder, under their stored names.

  Raises:
    UserError: nothing there, unreadable, a pickle, or a name that two files have.
  """
  path = Path(path)
  where: dict[str, tuple[_File, str, None]] = {}
  metadata: dict[str, str] = {}
  for name in [path] if path.is_file() else _weight_files(path):
    file = _File(name, stack)
    metadata |= file.metadata
    for stored in file.names:
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
    files = [index.parent / name for name in names]
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"{index} is no index of weight files; get it again") from error
  for file in files:
    if not file.is_file():
      raise UserError(f"{file}, named in {index.name}, is missing; get it again")
  return files
