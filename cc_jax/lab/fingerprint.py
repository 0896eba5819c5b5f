"""What makes results comparable: the fingerprint of a suite, and the changes of an arm."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_collections

from cc_jax.cli import ORIGINAL_KEYS, flatten_config, original_value
from cc_jax.errors import UserError
from cc_jax.lab import judge
from cc_jax.lab.results import read_result
from configs import subjects3d
from data_pipeline.subjects3d.factors import VERSION

# How a run is scored: results that differ in one of these cannot be compared.
_SCORED = ("split", "subjects", "styled", "hatted", "interventions", "curve_subjects",
           "curve_interventions", "probe_subjects", "probe_views", "timestep")
# What may differ between runs of a suite, besides the whole section `mesh`.
_FREE = ("seed", "base", "data.data_dir", "train.log_every", "train.save_every", "train.keep",
         "train.keep_every")
# The keys, with their defaults, that configs/subjects3d.py had when the committed suite ran.
_FIRST_KEYS = Path(__file__).parents[1] / "assets" / "lab_config_keys.json"
# Defaults at first, of keys added later whose default has changed since.
_EARLIER_DEFAULTS: dict[str, Any] = {}


def fingerprint(config: ml_collections.ConfigDict, base_hash: str) -> str:
  """Hash of everything that all runs of a suite must share: base, world, judge, budget, scoring.

  Of `config.run` it covers the keys that the committed suite had, under their names of then, and
  of keys added later those whose value is not the default. So a key can be added, renamed or
  removed while committed results stay valid.
  """
  score = config.score
  shared = dict(base=base_hash, world=VERSION,
                judge=hashlib.sha256(judge.SHIPPED.read_bytes()).hexdigest(),
                score={key: score[key] for key in _SCORED})
  if score.rounds != 1:  # the first results do not know it
    shared["score"]["rounds"] = score.rounds
  values = json.loads(_FIRST_KEYS.read_text())
  defaults = flatten_config(subjects3d.get_config().to_dict()) | _EARLIER_DEFAULTS
  for key, value in flatten_config(config.run.to_dict()).items():
    first_name = ORIGINAL_KEYS.get(key, key)
    free = key in _FREE or key.startswith("mesh.")
    if not free and (first_name in values or value != defaults.get(key)):
      values[first_name] = original_value(key, value)
  for key, value in values.items():
    section, _, field = key.rpartition(".")
    shared.setdefault(section, {})[field] = value
  text = json.dumps(shared, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_names(changes: Any) -> Any:
  """`changes` with keys as result files spell them (`ORIGINAL_KEYS`), as JSON gives them back."""
  if isinstance(changes, dict):
    return {ORIGINAL_KEYS.get(key, key): first_names(value) for key, value in changes.items()}
  if isinstance(changes, list | tuple):
    return [first_names(value) for value in changes]
  return changes


def is_done(file: Path, suite: str, changes: dict[str, Any]) -> bool:
  """Whether a result exists.

  Raises:
    UserError: it has another fingerprint than `suite`, or is of an arm with other changes.
  """
  if not file.exists():
    return False
  result = read_result(file)
  if result["fingerprint"] != suite:
    raise UserError(
      f"{file} was made with another base, budget, config or scoring: nothing can be compared with "
      "it; give --results another folder, or remove it")
  if result["changes"] != first_names(changes):
    raise UserError(
      f"{file} is of an arm with the changes {result['changes']}, and that name now stands for "
      f"{changes}; give the new arm another name, or remove the file")
  return True
