"""LoRA files merged into a frozen base while it is loaded: W + scale · (alpha / rank) · up · down.

Low-rank adaptation (Hu et al. 2021) in the formats that people share (lora_names.py lists them), of
linear layers and of convolutions.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cc_jax.bases.lora_changes import Change, core_shape
from cc_jax.bases.lora_names import module_spellings, split_key
from cc_jax.bases.weights import TensorWrapper, open_tensors
from cc_jax.errors import UserError, first_names

_METADATA = "lora_adapter_metadata"  # where diffusers writes PEFT's settings


class Lora:
  """One file, and how much of it is wanted."""

  def __init__(self, path: str | Path, scale: float = 1.0):
    """Reads the file.

    Raises:
      UserError: unreadable, or not a LoRA of a kind that we have.
    """
    self.path, self.scale = Path(path), float(scale)
    if not math.isfinite(self.scale):
      raise UserError(f"the scale of {path} is {scale}; give a number, 1 for the LoRA as it is")
    if not self.path.is_file():
      raise UserError(f"{path} is no file; name the LoRA's .safetensors file")
    # (component, module as the file names it) -> its factors.
    self._changes: dict[tuple[str, str], Change] = {}
    with contextlib.ExitStack() as stack:
      tensors = open_tensors(self.path, stack)
      for key in tensors:
        module, factor = split_key(key, self.path)
        change = self._changes.setdefault(module, Change())
        if getattr(change, factor) is not None:
          raise UserError(f"{path} has {key} in two spellings; keep one")
        value = tensors[key]
        setattr(change, factor, float(value.flat[0]) if factor == "alpha" else value)
      self._read_metadata(tensors.metadata)
    for (_, module), change in self._changes.items():
      self._check(module, change)
    if not self._changes:
      raise UserError(f"{path} is empty; get it again")

  @property
  def identity(self) -> str:
    """What was merged, for the base's hash."""
    with open(self.path, "rb") as file:
      return f"{hashlib.file_digest(file, 'sha256').hexdigest()} {self.scale}"

  def _read_metadata(self, metadata: Mapping[str, str]) -> None:
    """PEFT's alphas, which diffusers keeps in the header and not in tensors."""
    settings = json.loads(metadata.get(_METADATA, "{}"))
    for (component, module), change in self._changes.items():
      options = {
        name.removeprefix(f"{component}."): value for name, value in settings.items()
        if name.startswith(f"{component}.")
      }  # fmt: skip
      if options.get("use_dora") or options.get("lora_bias"):
        raise UserError(f"{self.path} uses DoRA or biases, which we do not have; use a plain LoRA")
      alpha = options.get("lora_alpha")
      for pattern, value in (options.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", module):
          alpha = value
      if alpha is None or change.alpha is not None or change.down is None:
        continue
      rank = change.down.shape[0]
      change.alpha = float(alpha) * (rank**0.5 if options.get("use_rslora") else 1.0)

  def _check(self, module: str, change: Change) -> None:
    missing = [part for part in ("down", "up") if getattr(change, part) is None]
    if missing:
      raise UserError(f"{self.path} lacks the {missing[0]} weights of {module}; get it again")
    rank = change.down.shape[0]
    if change.up.ndim < 2 or change.down.ndim < 2 or change.up.shape[1] != rank or not rank:
      raise UserError(
        f"{self.path}: {module} has factors {change.up.shape} and {change.down.shape}, which "
        "do not multiply; get it again"
      )

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
      if core_shape(change.shape()) != core_shape(wanted):
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
  """A component's tensors with the changes added as each is read; the sum is made in float32."""

  def __init__(
    self, tensors: Mapping[str, np.ndarray], changes: Mapping[str, list[tuple[Change, float]]]
  ):
    """`changes`: our name of a tensor -> changes and their scales."""
    super().__init__(tensors)
    self._changes = changes

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    for change, scale in self._changes.get(name, ()):
      delta = np.float32(scale) * change.delta()
      tensor = tensor.astype(np.float32) + delta.reshape(tensor.shape)
    return tensor
