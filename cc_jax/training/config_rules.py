"""Rules for the values of a config, and the walk that holds a config against a table of them.

A rule says of a value what it must do ("be at least 1"), or None where it does. The tables are in
config_checks.py, here and in cc_jax/lab and cc_jax/pretrain.
"""

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cc_jax.errors import UserError

Rule = Callable[[Any], str | None]


def whole(low: int | None = None, *, or_value: int | None = None) -> Rule:
  """Whole numbers of 64 bits, from `low` on; besides, one value with a meaning of its own."""

  def rule(value: Any) -> str | None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
      return "be a whole number"
    if not -(2**63) <= value < 2**63:
      return "fit into 64 bits"
    if low is None or value >= low or value == or_value:
      return None
    return _at_least(low) + ("" if or_value is None else f", or {or_value}")

  return rule


def real(
  low: float | None = None, high: float | None = None, *, above: float | None = None,
  below: float | None = None,
) -> Rule:
  """Finite numbers in the interval: `low` and `high` belong to it, `above` and `below` do not."""
  start, end = (low, high) if above is None else (above, high)
  end = below if below is not None else end
  bounds = ("(" if low is None else "[", f"{start}, {end}", "]" if below is None else ")")

  def rule(value: Any) -> str | None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
      return "be a number"
    if not math.isfinite(value):
      return "be a finite number"
    inside = (low is None or value >= low) and (above is None or value > above)
    inside &= (high is None or value <= high) and (below is None or value < below)
    if inside:
      return None
    if end is not None:
      return f"lie in {''.join(bounds)}"
    return "be positive" if above == 0 else _at_least(start)

  return rule


def boolean(value: Any) -> str | None:
  return None if isinstance(value, bool) else "be True or False"


def text(value: Any) -> str | None:
  return None if isinstance(value, str) else "be a text"


def filled(value: Any) -> str | None:
  """A text that is not empty."""
  return text(value) or (None if value.strip() else "not be empty")


def with_noun(value: Any) -> str | None:
  """A prompt that says where the subject's class noun goes."""
  return text(value) or (None if "{noun}" in value else "have {noun} in it")


def one_of(*names: str) -> Rule:
  """One of some words; the rule says which is meant where one is much like the value."""

  def rule(value: Any) -> str | None:
    if isinstance(value, str) and value in names:
      return None
    return f"be one of {', '.join(names)}{did_you_mean(value, names)}"

  return rule


def several(item: Rule, *, count: int | None = None, least: int = 0) -> Rule:
  """A tuple or list, of `count` values or of `least` and more, each of which meets `item`."""

  def rule(value: Any) -> str | None:
    if not isinstance(value, tuple | list):
      return "be a tuple" if count is None else f"be a tuple of {count} values"
    if count is not None and len(value) != count:
      return f"have {count} values"
    if len(value) < least:
      return f"have at least {least} value" + "s" * (least > 1)
    wrong = next((must for must in map(item, value) if must), None)
    return wrong and f"be a tuple of values, of which each must {wrong}"

  return rule


def section(value: Any) -> str | None:
  """A section whose keys somebody else checks."""
  return None if isinstance(value, Mapping) else "be a section of keys"


def note(rule: Rule, words: str) -> Rule:
  """The same rule; what it says is followed by a note."""
  return lambda value: f"{must} ({words})" if (must := rule(value)) else None


def check_values(
  config: Mapping[str, Any], rules: Mapping[str, Rule], *, explained_by: str,
  optional: Iterable[str] = (), prefix: str = "config.",
) -> None:
  """Holds a config against a table of dotted key -> rule: every key, and no other.

  Args:
    config: as plain dicts (`ConfigDict.to_dict`).
    rules: a key with dots is in that section.
    explained_by: the file that explains the keys, for errors.
    optional: dotted keys that may be missing.
    prefix: what goes before a dotted key in errors.

  Raises:
    UserError: a missing or unknown key, a section that is none, or a value that breaks its rule.
  """
  nested: dict[str, Any] = {}
  for dotted, rule in rules.items():
    *sections, key = dotted.split(".")
    level = nested
    for name in sections:
      level = level.setdefault(name, {})
    level[key] = rule
  _check_level(config, nested, prefix, explained_by, {f"{prefix}{key}" for key in optional})


def _check_level(
  config: Mapping[str, Any], rules: Mapping[str, Any], prefix: str, explained_by: str,
  optional: set[str],
) -> None:
  for key, value in config.items():
    if key not in rules:
      hint = did_you_mean(key, rules) or f"; remove it, {explained_by} lists all keys"
      raise UserError(f"{prefix}{key} is {shown(value)}, and there is no such key{hint}")
  for key, rule in rules.items():
    name = prefix + key
    if key not in config:
      if name in optional:
        continue
      raise UserError(
        f"{name} is missing; take it from {explained_by} (a section that is given as a whole needs "
        "all of its keys)"
      )
    value = config[key]
    if isinstance(rule, Mapping):
      if not isinstance(value, Mapping):
        raise UserError(f"{name} is {shown(value)}; it must be a section with {', '.join(rule)}")
      _check_level(value, rule, f"{name}.", explained_by, optional)
    elif must := rule(value):
      raise UserError(f"{name} is {shown(value)}; it must {must}")


def did_you_mean(name: Any, names: Iterable[str]) -> str:
  """'; did you mean X?' for the name that is most like it, '' where none is."""
  near = difflib.get_close_matches(str(name), list(names), 1)
  return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
  """The value in one short line."""
  words = " ".join(repr(value).split())
  return words if len(words) <= 60 else f"{words[:57]}..."


def _at_least(low: float) -> str:
  return "not be negative" if low == 0 else f"be at least {low}"
