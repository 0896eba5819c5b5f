"""LoRA files merged into a frozen base while it is loaded: W + scale · (alpha / rank) · up · down.

Low-rank adaptation (Hu et al. 2021) and its relatives (lora_changes.py) in the formats that people
share (lora_names.py), of linear layers and of convolutions.
"""

import contextlib
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from cc_jax.bases import download
from cc_jax.bases.lora_changes import Change
from cc_jax.bases.lora_names import COMPONENTS, PEFT, module_spellings, split_key
from cc_jax.bases.lora_settings import CONFIG_FILE, config_file, read_settings
from cc_jax.bases.tensor_files import TensorWrapper, open_tensors, refuse_pickle
from cc_jax.errors import UserError, first_names

# What PEFT's and diffusers' save functions call a LoRA in a folder of its own.
_IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def find_lora(name: str | Path) -> Path:
  """A LoRA's file or folder: a path, or `owner/name[/inside][@revision]` on the hub."""
  if not Path(name).exists() and download.is_hub_id(str(name)):
    inside, at, revision = str(name).partition("@")
    if not inside.endswith(".safetensors"):
      folders = ("", *(f"{component}/" for component in COMPONENTS))
      files = (*_IN_FOLDERS, CONFIG_FILE)
      return download.fetch_folder(str(name), [f"{a}{b}" for a in folders for b in files])
    folder, _, file = inside.rpartition("/")
    if file == _IN_FOLDERS[0] and download.is_hub_id(folder):  # its strength is in a file beside it
      download.fetch_folder(f"{folder}{at}{revision}", (CONFIG_FILE,))
  return download.find_file(name)


class Lora:
  """One LoRA, and how much of it is wanted."""

  def __init__(self, path: str | Path, scale: float = 1.0):
    """Reads a file, or a folder as PEFT and diffusers save one.

    Raises:
      UserError: unreadable, or not a LoRA of a kind that we have.
    """
    self.path, self.scale = Path(path), float(scale)
    if not math.isfinite(self.scale):
      raise UserError(f"the scale of {path} is {scale}; give a number, 1 for the LoRA as it is")
    self._files = _files(self.path)
    # (component, module as the file names it) -> its factors.
    self._changes: dict[tuple[str, str], Change] = {}
    for file in self._files:
      self._read(file)
    for (_, module), change in self._changes.items():
      self._check(module, change)
    if not self._changes:
      raise UserError(f"{path} is empty; get it again")

  @property
  def identity(self) -> str:
    """What was merged, for the base's hash."""
    contents = [content for file in self._files for content in (file, config_file(file)) if content]
    digests = []
    for content in contents:
      with open(content, "rb") as file:
        digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return f"{' '.join(digests)} {self.scale}"

  def _read(self, file: Path) -> None:
    with contextlib.ExitStack() as stack:
      tensors = open_tensors(file, stack)
      changes: dict[tuple[str, str], Change] = {}
      for key in tensors:
        module, factor = split_key(key, file)
        change = changes.setdefault(module, Change())
        if factor in change.factors or module in self._changes:
          raise UserError(f"{file} has {key} in two spellings; keep one")
        change.factors[factor] = tensor = tensors[key]
        if not np.isfinite(tensor).all():
          raise UserError(f"{file}: {key} is not finite (NaN or infinity); get it again")
        if tensor.size != 1 if factor == "alpha" else tensor.dtype.kind in "iub":
          raise UserError(f"{file}: {key} is {tensor.dtype} {tensor.shape}; get it again")
      self._set_strengths(file, changes, tensors.metadata)
      if any(key.startswith(PEFT) for key in tensors) and not config_file(file):
        logging.warning("%s: %s is not beside it, where PEFT keeps how strong a LoRA is; taken for "
                        "alpha = rank", file, CONFIG_FILE)  # fmt: skip
    self._changes |= changes

  def _set_strengths(
    self, file: Path, changes: Mapping[tuple[str, str], Change], metadata: Mapping[str, str]
  ) -> None:
    """PEFT's alphas, which are not in tensors."""
    settings = read_settings(file, metadata)
    for (component, module), change in changes.items():
      if component not in settings or "alpha" in change.factors or change.missing():
        continue
      if settings[component].use_dora and "lora_magnitude_vector" not in change.factors:
        raise UserError(f"{file} lacks the lora_magnitude_vector of {module}; get it again")
      spellings = (module, module.removeprefix("text_model."))
      change.strength = settings[component].strength(module, spellings, change.rank)

  def _check(self, module: str, change: Change) -> None:
    if missing := change.missing():
      raise UserError(f"{self.path} lacks the {missing[0]} weights of {module}; get it again")
    try:
      change.shape()
    except UserError as error:
      raise UserError(f"{self.path}: {module} {error}; get it again") from None

  def resolve(
    self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], other_names: Mapping[str, str]
  ) -> dict[str, dict[str, Change]]:
    """Finds each change's tensor: component -> our name of the tensor -> change.

    Args:
      shapes: component -> our name -> shape, of all the base's networks.
      other_names: our name of a module of the UNet -> the original code's.

    Raises:
      UserError: a change is for a module that the base lacks, or of another shape.
    """
    spellings = {
      name: module_spellings(name, tensors, other_names if name == "unet" else {})
      for name, tensors in shapes.items()
    }
    resolved: dict[str, dict[str, Change]] = {}
    missing, wrong = [], []
    for (component, module), change in self._changes.items():
      name = spellings.get(component, {}).get(module)
      if name is None:
        missing.append(f"{component}'s {module}")
        continue
      tensor = f"{name}.weight"
      wanted = shapes[component][tensor]
      if not change.fits(wanted):
        wrong.append(f"{component}'s {name} is {change.shape()}, there {wanted}")
      if tensor in resolved.setdefault(component, {}):
        raise UserError(f"{self.path} changes {component}'s {name} twice; keep one spelling")
      resolved[component][tensor] = change
    if missing or wrong:
      kinds = [
        f"{len(names)} of its {len(self._changes)} modules {label}: {first_names(names)}"
        for label, names in (("are not in this base", missing), ("have other shapes", wrong))
        if names
      ]
      raise UserError(
        f"{self.path} is a LoRA for another base ({'. '.join(kinds)}); use one that was made for "
        "this base"
      )
    return resolved


class Merged(TensorWrapper):
  """A component's tensors, changed as each is read; the sum is made in float32."""

  def __init__(
    self, tensors: Mapping[str, np.ndarray], changes: Mapping[str, list[tuple[Change, float]]]
  ):
    """`changes`: our name of a tensor -> changes and their scales, made in this order."""
    super().__init__(tensors)
    self._changes = changes

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    for change, scale in self._changes.get(name, ()):
      tensor = change.apply(tensor, scale)
    return tensor


def _files(path: Path) -> list[Path]:
  """The file itself, or those in a folder or in its subfolders unet/, text_encoder/, ..."""
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise UserError(f"{path} is no file; name the LoRA's .safetensors file, or its folder")
  folders = (path, *(path / component for component in COMPONENTS))
  for name in _IN_FOLDERS:
    if found := [folder / name for folder in folders if (folder / name).is_file()]:
      return found
  for file in (folder / name for folder in folders for name in _IN_FOLDERS):
    if file.with_suffix(".bin").is_file():
      refuse_pickle(file.with_suffix(".bin"))
  raise UserError(
    f"{path} holds no {' or '.join(_IN_FOLDERS)}; name the LoRA's .safetensors file"
  )
