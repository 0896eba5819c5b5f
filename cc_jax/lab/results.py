"""Result files of the laboratory, and the fingerprint of what makes them comparable."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import ml_collections

from cc_jax.errors import UserError
from cc_jax.lab import judge as judging
from data_pipeline.subjects3d.factors import VERSION

# How a run is scored: results that differ in one of these cannot be compared.
_SCORED = ("split", "subjects", "styled", "hatted", "interventions", "curve_subjects",
           "curve_interventions", "probe_subjects", "probe_views", "timestep")


# ---- one run


def fingerprint(config: ml_collections.ConfigDict, base_hash: str) -> str:
  """Of everything that all runs of a suite must share: base, world, judge, budget, scoring."""
  run, score = config.run, config.score
  judge = hashlib.sha256(judging.SHIPPED.read_bytes()).hexdigest()
  shared = dict(
    base=base_hash, world=VERSION, judge=judge, score={key: score[key] for key in _SCORED})
  if score.rounds != 1:  # older marks do not know it
    shared["score"]["rounds"] = score.rounds
  for section in ("data", "encoder", "injection", "objective", "train", "sample"):
    shared[section] = run[section].to_dict()
  for section, keys in (("data", ("data_dir",)),
                        ("train", ("log_every", "save_every", "keep", "keep_every"))):
    for key in keys:
      shared[section].pop(key, None)
  text = json.dumps(shared, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_file(results: Path, arm: str, seed: int, split: str, tuned: Any = None) -> Path:
  """Where the result of a run lies."""
  value = "" if tuned is None else f"@{tuned:g}"
  ending = "" if split == "validation" else f"-{split}"
  return results / f"{arm}{value}-{seed}{ending}.json"


def read_result(file: Path) -> dict[str, Any]:
  """A result."""
  return json.loads(file.read_text())


def write_result(file: Path, result: dict[str, Any]) -> None:
  """A result, whole or not at all; numbers of one list on one line."""
  lists = []

  def short(value):
    if isinstance(value, list) and not any(isinstance(v, dict) for v in value):
      lists.append(json.dumps(value))
      return f"@{len(lists) - 1}@"
    if isinstance(value, dict):
      return {key: short(v) for key, v in value.items()}
    return [short(v) for v in value] if isinstance(value, list) else value

  text = json.dumps(short(result), indent=1)
  for number, line in enumerate(lists):
    text = text.replace(f'"@{number}@"', line, 1)
  file.parent.mkdir(parents=True, exist_ok=True)
  part = file.with_name(file.name + ".part")
  part.write_text(text + "\n")
  os.replace(part, file)


def is_done(file: Path, mark: str, changes: dict[str, Any]) -> bool:
  """Whether a result is there; raises UserError if it is one of another suite or of another arm."""
  if not file.exists():
    return False
  found = read_result(file)
  if found["fingerprint"] != mark:
    raise UserError(
      f"{file} was made with another base, budget, config or scoring: nothing can be compared with "
      "it; give --results another folder, or remove it")
  if found["changes"] != changes:
    raise UserError(
      f"{file} is of an arm with the changes {found['changes']}, and that name now stands for "
      f"{changes}; give the new arm another name, or remove the file")
  return True
