"""Which runs there are: the arms of configs/lab.py with their seeds and tuned values."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from cc_jax.errors import UserError
from cc_jax.lab.comparison import tuning_score
from cc_jax.lab.fingerprint import first_names
from cc_jax.lab.results import read_result, result_file
from configs.lab import ARMS, Arm

ALL_SEEDS = ("core", "control")  # families that run with every seed


def find_arm(name: str) -> Arm:
  """An arm of configs/lab.py; UserError if it does not exist."""
  if name not in ARMS:
    raise UserError(f"arm {name!r} is unknown; configs/lab.py has {', '.join(ARMS)}")
  return ARMS[name]


def arm_config(
  config: ml_collections.ConfigDict, name: str, seed: int, tuned: Any = None
) -> ml_collections.ConfigDict:
  """The laboratory's config with an arm's changes in `run`; `tuned` is the value of its `tune` key.

  Raises:
    UserError: an arm or a key that does not exist.
  """
  arm, config = find_arm(name), config.copy_and_resolve_references()
  changes = dict(arm.changes) | ({arm.tune[0]: tuned} if tuned is not None else {})
  for key in changes:
    section, _, field = key.partition(".")
    if field not in config.run.get(section, {}):
      raise UserError(f"arm {name!r} changes {key}, which configs/subjects3d.py does not have")
  try:
    config.run.update_from_flattened_dict({**changes, "seed": seed})
  except (TypeError, ValueError) as error:
    raise UserError(f"arm {name!r} has a value of a wrong type: {error}") from error
  encoder = config.run.encoder  # S+ takes its words from the textual queries
  encoder.textual_queries = max(encoder.s_words, encoder.textual_queries)
  return config


def list_runs(config: ml_collections.ConfigDict, names: Sequence[str], results: Path,
              candidates: int = 0) -> Iterator[tuple[str, int, Any]]:
  """(arm, seed, tuned value) of every run, in the order of `names`.

  An arm to be tuned first runs every candidate (at most `candidates`, 0 = all) with the first seed;
  the best, by fidelity plus control, runs the other seeds: so results must be written meanwhile.
  The validation subjects choose, whatever the split.

  Raises:
    UserError: an unknown arm, or one to be tuned that has no validation results to choose by.
  """
  for name in names:
    arm = find_arm(name)
    first, *others = config.seeds if arm.family in ALL_SEEDS else config.side_seeds
    if arm.tune is None:
      yield from ((name, seed, None) for seed in (first, *others))
      continue
    values, split = arm.tune[1][: candidates or None], config.score.split
    if split == "validation":
      yield from ((name, first, value) for value in values)
    files = {value: result_file(results, name, first, "validation", value) for value in values}
    scores = {value: tuning_score(read_result(file)) for value, file in files.items()
              if file.exists()}
    missing = [file for value, file in files.items() if value not in scores]
    # On the validation subjects all were just tried: one that is missing has failed, and is worst.
    if missing and (split != "validation" or not scores):
      raise UserError(f"{missing[0]} is missing: run the suite on the validation subjects first")
    best = max(scores, key=scores.get)
    if split != "validation":
      yield name, first, best
    yield from ((name, seed, best) for seed in others)


def changes_of(arm: Arm) -> dict[str, Any]:
  """What an arm changes, as its result file says it."""
  return first_names(arm.changes | ({"first": arm.first} if arm.first else {}))


def first_phase(
  config: ml_collections.ConfigDict, share: float, changes: dict[str, Any]
) -> ml_collections.ConfigDict:
  """The config of a run's first steps; the second phase goes on from their checkpoint."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  config.train.steps = max(1, round(share * config.train.steps))
  config.train.schedule = "constant"  # a cosine would end here
  return config


def chosen_arms(arms_or_families: Sequence[str]) -> list[str]:
  """The names of arms, with every family's name replaced by those of its arms."""
  names = []
  for chosen in arms_or_families:
    names += [name for name, arm in ARMS.items() if chosen in (name, arm.family)] or [chosen]
  return list(dict.fromkeys(names))


def fast_arms() -> list[str]:
  """One arm of every family, and of the core ones those that figures compare."""
  first_of_family = {arm.family: name for name, arm in reversed(ARMS.items())}
  return ["method", "self_reconstruction", "ip_adapter_plus", *(
    name for name in ARMS if name in first_of_family.values() and ARMS[name].family != "core")]
