"""Config sections as frozen dataclasses, checked so that a typo is an error and not a default."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from cc_jax.errors import UserError

_Settings = TypeVar("_Settings")


def build(
  cls: type[_Settings], values: Mapping[str, Any], *, section: str,
  choices: Mapping[str, tuple[str, ...]],
) -> _Settings:
  """Builds the dataclass `cls` from a config section or from an adapter file's JSON.

  A field that `values` lacks takes the dataclass' default, if it has one: fields are added with the
  default that means what older files did.

  Raises:
    UserError: an unknown key, a missing one, a wrong type, or a value that is not among `choices`.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  taken: dict[str, Any] = {}
  for key, value in values.items():
    if key not in fields:
      raise UserError(f"config.{section}.{key} is unknown; {section} has {', '.join(fields)}")
    taken[key] = _typed(f"config.{section}.{key}", value, fields[key].type)
    if key in choices and value not in choices[key]:
      raise UserError(f"config.{section}.{key} is {value!r}; use one of {', '.join(choices[key])}")
  for key, field in fields.items():
    if key not in taken and field.default is dataclasses.MISSING:
      raise UserError(f"config.{section}.{key} is missing; configs/subjects3d.py explains it")
  return cls(**taken)


def _typed(name: str, value: Any, kind: type) -> Any:
  """The value as a `kind` (bool, int, str, or tuple of int)."""
  if kind is tuple:
    good = isinstance(value, tuple | list) and all(type(v) is int for v in value)
    if not good:
      raise UserError(f"{name} is {value!r}; it must be a tuple of integers")
    return tuple(value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise UserError(f"{name} is {value!r}; it must be of type {kind.__name__}")
  return value
