"""Numbers from result files: means over seeds, paired differences, curves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cc_jax.errors import UserError
from cc_jax.lab.results import read_results
from cc_jax.metrics.statistics import Interval, at_equal, hierarchical_bootstrap, nan_for_none

Result = dict[str, Any]
Arms = dict[str, list[Result]]  # by name, its seeds in order

METHOD, SELF, BASE = "method", "self_reconstruction", "base"
# Side arms that are compared with another arm than the method; two words in one would be unfair.
PAIRS = (("s_words_4", "self_s_words_4"), ("s_words_4", "multi_view_s_words_4"),
         ("multi_view_s_words_4", "self_s_words_4"), ("s_words_4", "ip_adapter_plus"),
         ("whole_frame", "whole_frame_self"))
MOVES = ("size", "place", "azimuth", "light", "scene")
INTRINSIC = ("class_id", "color1", "color2", "pattern", "pattern_color", "wide", "tall", "ratio")
IRRELEVANT = ("azimuth", "elevation", "roll", "size", "x", "y", "light_azimuth", "scene")
PROBED = (*INTRINSIC, *IRRELEVANT)


def load_results(folder: Path, split: str) -> Arms:
  """The results of a split, by arm, the best value of a tuned arm alone.

  Raises:
    UserError: none of this split, or of different budgets, bases or scorings.
  """
  results = [result for result in read_results(folder) if result["split"] == split]
  if not any(result["arm"] != BASE for result in results):
    raise UserError(f"{folder} has no results of the {split} subjects; run --suite=ablation first")
  fingerprints = {result["fingerprint"] for result in results}
  if len(fingerprints) > 1:
    raise UserError(
      f"the results in {folder} are of {len(fingerprints)} different budgets, bases or scorings; "
      "keep those of one, or give each a --results folder of its own")
  arms: Arms = {}
  # What figures show comes first, so that an arm has the same colour in all of them.
  rank = {family: number for number, family in enumerate(("core", "control", "base"))}
  key = lambda r: (r["arm"] != METHOD, rank.get(r["family"], 9), r["family"], r["arm"], r["seed"])  # noqa: E731
  for result in sorted(results, key=key):
    arms.setdefault(result["arm"], []).append(result)
  return {name: _best_value(rows) for name, rows in arms.items()}


def _best_value(rows: list[Result]) -> list[Result]:
  """The results with the tuned value that was best with the first seed."""
  if len({row["tuned"] for row in rows}) == 1:
    return rows
  first = min(row["seed"] for row in rows)
  scores = {row["tuned"]: tuning_score(row) for row in rows if row["seed"] == first}
  best = max(scores, key=scores.get)
  return [row for row in rows if row["tuned"] == best]


def trained_arms(arms: Arms) -> Arms:
  """All but the base."""
  return {name: rows for name, rows in arms.items() if name != BASE}


def known_pairs(arms: Arms) -> list[tuple[str, str]]:
  """Those of PAIRS of which both arms have results."""
  return [pair for pair in PAIRS if arms.keys() >= set(pair)]


def layer_names(arms: Arms) -> list[str]:
  """Names of all that was probed: the layers of S+, visual tokens, image features."""
  rows = [row for rows in trained_arms(arms).values() for row in rows]
  return list(dict.fromkeys(layer for row in rows for layer in row["features"]))


def has_features(arms: Arms) -> bool:
  """Whether these runs were scored by their features, too."""
  return any(row["features"] for rows in arms.values() for row in rows)


def s_plus_layers(row: Result) -> list[Mapping[str, Any]]:
  """The scores of each layer of S+; empty for an arm that has none."""
  return [value for name, value in row["features"].items() if name.startswith("layer")]


def tuning_score(result: Result) -> float:
  """The score by which a tuned value is chosen."""
  return result["scores"]["fidelity"] + result["scores"]["control"]


def over_seeds(rows: Sequence[Result], get: Callable[..., float | None], *args: Any) -> np.ndarray:
  """`get(row, *args)` of each seed, NaN where it is None."""
  return nan_for_none([get(row, *args) for row in rows])


def score(row: Result, key: str) -> float | None:
  """A score of the drawn pictures, averaged over subjects."""
  return row["scores"].get(key)


def mean_leakage(row: Result, move: str) -> float | None:
  """The mean leakage of one factor."""
  known = [value for value in row["leakage"].get(move, ()) if value is not None]
  return float(np.mean(known)) if known else None


def layer_score(row: Result, layer: str, key: str) -> float | None:
  """A score of one layer; None where the run does not have the layer."""
  return row["features"].get(layer, {}).get(key)


def layer_probe(row: Result, layer: str, factor: str) -> float | None:
  """The score of a probe on one layer; None as in `layer_score`."""
  return row["features"][layer]["probes"][factor]["score"] if layer in row["features"] else None


def probe(row: Result, factor: str) -> float | None:
  """A probe's score averaged over the layers of S+."""
  layers = s_plus_layers(row)
  return float(np.mean([layer["probes"][factor]["score"] for layer in layers])) if layers else None


def chance(arms: Arms, factor: str) -> float:
  """The score of a probe that knows nothing."""
  row = next(iter(trained_arms(arms).values()))[0]
  return next(iter(row["features"].values()))["probes"][factor]["chance"]


def subject_scores(row: Result, key: str) -> np.ndarray:
  """A score of each subject, [n]."""
  return nan_for_none(row["subjects"][key])


def scores_by_round(row: Result, key: str) -> np.ndarray:
  """A score of each subject in each round, [rounds, n]."""
  rounds = row.get("rounds", [row["subjects"]])
  return np.stack([nan_for_none(scores[key]) for scores in rounds])


def subject_leakage(row: Result, move: str) -> np.ndarray:
  """The leakage of one factor of each subject, [n]; empty where it was not measured."""
  return nan_for_none(row["leakage"].get(move, ()))


def paired_difference(
  rows: Sequence[Result], others: Sequence[Result], get: Callable[..., np.ndarray], *args: Any
) -> Interval:
  """`rows` - `others` of `get(row, *args)`, a value per subject, over the seeds that both have.

  An arm with a single seed is compared with every seed of the other: one lucky seed of the method
  would make all of them look worse. What another seed of that arm would do is not in the interval.
  """
  by_seed = {row["seed"]: row for row in others}
  if 1 in (len(rows), len(others)):
    pairs = [(a, b) for a in rows for b in others]
  else:
    pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
  differences = [get(a, *args) - get(b, *args) for a, b in pairs]
  if not differences or not differences[0].size:
    return Interval(*[float("nan")] * 3)
  return hierarchical_bootstrap(np.stack(differences))


def at_equal_identity(
  rows: Sequence[Result], others: Sequence[Result], move: str
) -> tuple[float, float, float]:
  """(identity, leakage of `rows`, of `others`) at the highest identity that both reach in training.

  Curves are means over the seeds. NaN where a curve has fewer than two points: nothing is known of
  the course of runs that were scored at their end alone, as on the test subjects.
  """
  curves = [curve(arm, move) for arm in (rows, others)]
  if any(len(identity) < 2 for identity, _ in curves):
    return (float("nan"),) * 3
  level = min(identity.max() for identity, _ in curves)
  return level, *(at_equal(identity, leakage, level) for identity, leakage in curves)


def curve(rows: Sequence[Result], move: str) -> tuple[np.ndarray, np.ndarray]:
  """(identity, leakage of a factor) at every checkpoint, averaged over seeds."""
  steps = sorted({point["step"] for row in rows for point in row["curve"]})
  identity, leakage = [], []
  for step in steps:
    points = [point for row in rows for point in row["curve"] if point["step"] == step]
    leaks = [leak for point in points if (leak := point["leakage"].get(move)) is not None]
    if leaks:
      identity.append(np.mean([point["fidelity"] for point in points]))
      leakage.append(np.mean(leaks))
  return np.asarray(identity), np.asarray(leakage)


def sweep(rows: Sequence[Result]) -> dict[float, tuple[float, float]]:
  """{scale: (fidelity, control)}, averaged over the seeds; empty for an arm that was not swept."""
  by_scale: dict[float, list] = {}
  for point in (point for row in rows for point in row.get("sweep") or ()):
    by_scale.setdefault(point["scale"], []).append((point["fidelity"], point["control"]))
  return {scale: tuple(np.mean(np.asarray(values, float), axis=0))
          for scale, values in sorted(by_scale.items())}
