"""Config keys that had another name at commit 0d5bef4. Imports nothing of cc_jax: all import it."""

from collections.abc import Mapping
from typing import Any

# Dotted key at 0d5bef4 -> today's.
RENAMED = {
  "data.reference_share": "data.reference_ratio",
  "data.reference_place": "data.reference_layout",
  "data.positive_share": "data.positive_ratio",
  "data.terse_captions": "data.caption_drop_detail_prob",
  "data.group_share": "data.group_ratio",
  "train.accumulate": "train.grad_accum_steps",
  "train.gate_rate": "train.gate_lr_mult",
  "train.gaps_every": "train.prompt_sensitivity_every",
  "world.calm_share": "world.calm_ratio",
  "world.plain_share": "world.plain_ratio",
  "clip.white_share": "clip.white_ratio",
  "clip.mirror_share": "clip.mirror_ratio",
  "unet.calm_share": "unet.calm_ratio",
  "judge.fresh": "judge.test_images",
}
RENAMED |= {f"run.{old}": f"run.{new}" for old, new in RENAMED.items()}  # the laboratory's training
ORIGINAL = {new: old for old, new in RENAMED.items()}
RENAMED_REMAT = {"products": "dots"}  # words of train.remat_unet and train.remat_text


def current(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The `dotted` config of an older run with today's names."""
  return {RENAMED.get(key, key): _current_value(key, value) for key, value in flat.items()}


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested config as dotted key -> value."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= dotted(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def renamed_message(flat: Mapping[str, Any]) -> str:
  """One line that says what the first old name in a `dotted` config is now; '' if all are new."""
  for key, value in flat.items():
    if key in RENAMED:
      return f"the config key {key} is now {RENAMED[key]}"
    if (now := _current_value(key, value)) != value:
      return f"config.{key} is {value!r}; that policy is now called {now!r}"
  return ""


def _current_value(key: str, value: Any) -> Any:
  if ".remat_" not in key:
    return value
  if isinstance(value, list | tuple):
    return type(value)(RENAMED_REMAT.get(word, word) for word in value)
  return RENAMED_REMAT.get(value, value)
