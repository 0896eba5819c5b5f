"""PEFT's settings of a LoRA, which say how strong it is: W + lora_alpha / r · up · down.

PEFT writes them into adapter_config.json beside adapter_model.safetensors, and diffusers copies
them, with each network's name in front, into the header of pytorch_lora_weights.safetensors.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cc_jax.bases.lora_names import COMPONENTS
from cc_jax.errors import UserError

CONFIG_FILE = "adapter_config.json"
_HEADER = "lora_adapter_metadata"
# peft_type -> its name of alpha. All default to alpha = 8 and r = 8.
_ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
_DEFAULT = 8
# Values of init_lora_weights that subtract the first factors from the base itself.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftSettings:
  """What PEFT's LoraConfig, LoHaConfig or LoKrConfig says about one network."""

  def __init__(self, values: Mapping[str, Any], what: str):
    """`what` names their source in errors; raises UserError for what we do not have."""
    self._values, self._what = values, what
    kind = values.get("peft_type") or "LORA"
    if kind not in _ALPHAS:
      raise UserError(f"{what} has peft_type={kind!r}; we have {', '.join(_ALPHAS)}")
    if values.get("lora_bias"):
      raise UserError(f"{what} has lora_bias, which we do not have; use a LoRA without biases")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
      raise UserError(
        f"{what} has init_lora_weights={start!r}, which changes the base itself; save it with "
        "PEFT's path_initial_model_for_weight_conversion"
      )
    self._alpha = _ALPHAS[kind]

  @property
  def use_dora(self) -> bool:
    return bool(self._values.get("use_dora"))

  def strength(self, module: str, spellings: Iterable[str], rank: int | None) -> float:
    """alpha / r, or alpha / sqrt(r), of a module.

    As in PEFT the first key of a pattern that is the module's name, or the end of it after a dot,
    counts, and is a regular expression.

    Args:
      module: its name, for errors.
      spellings: its names in PEFT's eyes, with and without transformers' `text_model.`.
      rank: of its factors; None if they do not say.

    Raises:
      UserError: the settings contradict the factors, or are no numbers.
    """
    spellings = list(spellings)
    alpha, r = (
      self._number(key, pattern, spellings)
      for key, pattern in ((self._alpha, "alpha_pattern"), ("r", "rank_pattern"))
    )
    if not r or (rank is not None and r != rank):
      raise UserError(
        f"{self._what} says rank {r:g} of {module}, and its factors have {rank}; get both again"
      )
    return alpha / (r**0.5 if self._values.get("use_rslora") else r)

  def _number(self, key: str, pattern: str, spellings: list[str]) -> float:
    value = self._values.get(key, _DEFAULT)
    patterns = self._values.get(pattern) or {}
    try:
      for name, other in patterns.items():
        if any(re.match(rf"(.*\.)?({name})$", spelling) for spelling in spellings):
          value = other
          break
      return float(value)
    except (TypeError, ValueError, AttributeError, re.error) as error:
      raise UserError(
        f"{self._what} has {key}={value!r} and {pattern}={patterns!r}; {key} is a number, and the "
        "pattern maps names to numbers"
      ) from error


def read_settings(file: Path, metadata: Mapping[str, str]) -> dict[str, PeftSettings]:
  """The settings of each network that they are known of.

  Args:
    file: the weights.
    metadata: of its header.

  Raises:
    UserError: unreadable, or a kind of LoRA that we do not have.
  """
  if _HEADER in metadata:
    values = _parse(metadata[_HEADER], f"the {_HEADER} of {file}")
    found = {}
    for component in COMPONENTS:
      start = f"{component}."
      own = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
      if own:
        found[component] = PeftSettings(own, f"the {_HEADER} of {file}")
    return found
  config = config_file(file)
  if config is None:
    return {}
  settings = PeftSettings(_parse(config.read_text(encoding="utf-8"), str(config)), str(config))
  return dict.fromkeys(COMPONENTS, settings)


def config_file(file: Path) -> Path | None:
  """The adapter_config.json that belongs to a file of weights."""
  config = file.parent / CONFIG_FILE
  return config if file.name.startswith("adapter_model") and config.is_file() else None


def _parse(text: str, what: str) -> dict[str, Any]:
  try:
    values = json.loads(text)
  except ValueError as error:
    raise UserError(f"{what} is no JSON ({error}); get it again") from error
  if not isinstance(values, dict):
    raise UserError(f"{what} is no JSON object; get it again")
  return values
