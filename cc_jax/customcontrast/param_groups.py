"""Which parameters are trained, which of them decay, at which rate, and of which part they are.

The modules say it themselves: `trained` of the classes in INJECTED, and of MFIEncoder.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from flax import nnx

from cc_jax.customcontrast.injection import INJECTED
from cc_jax.customcontrast.mfi_encoder import MFIEncoder
from cc_jax.models.params import ParamOptions


def param_options(path: Sequence[str | int]) -> ParamOptions | None:
  """How the parameter at a path is trained; None = it is frozen."""
  if path[0] == "mfi_encoder":
    return MFIEncoder.trained
  for attribute, child in zip(path, path[1:]):
    if attribute in INJECTED:
      return INJECTED[attribute].trained.get(child)
  return None


def is_trainable(path: Sequence[str | int], value: Any = None) -> bool:
  """Filter for `nnx.split(model, is_trainable, ...)`: the adapter's parameters, no others [P]."""
  return (value is None or isinstance(value, nnx.Param)) and param_options(path) is not None


def group_by_module(names: Iterable[str]) -> dict[str, list[str]]:
  """Dotted paths by the part of the model: 'unet', 'mfi_encoder.visual', 'mfi_encoder.fusion'..."""
  groups: dict[str, list[str]] = {}
  for name in names:
    parts = name.split(".")
    groups.setdefault(".".join(parts[: 2 if parts[0] == "mfi_encoder" else 1]), []).append(name)
  return groups
