"""Safetensors files, one or the shards in a folder; pickles are refused.

Opening reads the headers only, so that shapes cost nothing; tensors are read one by one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from cc_jax.errors import UserError, one_line

Convert = Callable[[np.ndarray], np.ndarray]
_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")


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
