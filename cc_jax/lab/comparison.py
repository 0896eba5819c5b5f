"""Numbers from result files: means over seeds, paired differences, curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cc_jax.errors import UserError
from cc_jax.lab.results import read_results
from cc_jax.metrics.statistics import Interval, at_equal, hierarchical_bootstrap

Result = dict[str, Any]
Arms = dict[str, list[Result]]  # by name, its seeds in order

METHOD, SELF, BASE = "method", "self_reconstruction", "base"
AGAINST = (SELF, "ip_adapter_plus")  # what the method is held against
# Side arms that are held against another arm than the method; two words in one would be unfair.
PAIRS = (("s_words_4", "self_s_words_4"), ("s_words_4", "multi_view_s_words_4"),
         ("multi_view_s_words_4", "self_s_words_4"), ("s_words_4", "ip_adapter_plus"),
         ("whole_frame", "whole_frame_self"))
MOVES = ("size", "place", "azimuth", "light", "scene")
INTRINSIC = ("class_id", "color1", "color2", "pattern", "pattern_color", "wide", "tall", "ratio")
IRRELEVANT = ("azimuth", "elevation", "roll", "size", "x", "y", "light_azimuth", "scene")
PROBED = (*INTRINSIC, *IRRELEVANT)


def load_results(results: Path, split: str) -> Arms:
  """The results of a split, by arm, the best value of a tuned arm alone."""
  found = [result for result in read_results(results) if result["split"] == split]
  if not any(result["arm"] != BASE for result in found):
    raise UserError(f"{results} has no results of the {split} subjects; run --suite=ablation first")
  marks = {result["fingerprint"] for result in found}
  if len(marks) > 1:
    raise UserError(
      f"the results in {results} are of {len(marks)} different budgets, bases or scorings; keep "
      "those of one, or give each a --results folder of its own")
  arms: Arms = {}
  # What figures show comes first, so that an arm has the same colour in all of them.
  rank = {family: place for place, family in enumerate(("core", "control", "base"))}
  key = lambda r: (r["arm"] != METHOD, rank.get(r["family"], 9), r["family"], r["arm"], r["seed"])  # noqa: E731
  for result in sorted(found, key=key):
    arms.setdefault(result["arm"], []).append(result)
  return {name: _best_value(rows) for name, rows in arms.items()}


def _best_value(rows: list[Result]) -> list[Result]:
  values = {row["tuned"] for row in rows}
  if len(values) == 1:
    return rows
  first = min(row["seed"] for row in rows)
  score = {row["tuned"]: row["scores"]["fidelity"] + row["scores"]["control"]
           for row in rows if row["seed"] == first}
  best = max(score, key=score.get)
  return [row for row in rows if row["tuned"] == best]


# ---- numbers


def over_seeds(rows: Sequence[Result], get: Callable[[Result], float | None]) -> np.ndarray:
  """What `get` finds in each seed, NaN where it finds nothing."""
  values = [get(row) for row in rows]
  return np.asarray([np.nan if value is None else value for value in values], float)


def mean_leakage(row: Result, move: str) -> float | None:
  """The mean leakage of one factor."""
  known = [value for value in row["leakage"].get(move, ()) if value is not None]
  return float(np.mean(known)) if known else None


def paired_difference(
  one: Sequence[Result], other: Sequence[Result], get: Callable[[Result], list]
) -> Interval:
  """The difference `one` - `other` of what each subject got, over the seeds that both have.

  An arm with a single seed is compared with every seed of the other: one lucky seed of the method
  would make all of them look worse. What another seed of that arm would do is not in the interval.
  """
  by_seed = {row["seed"]: row for row in other}
  if 1 in (len(one), len(other)):
    pairs = [(a, b) for a in one for b in other]
  else:
    pairs = [(row, by_seed[row["seed"]]) for row in one if row["seed"] in by_seed]
  rows = [np.asarray(get(a), float) - np.asarray(get(b), float) for a, b in pairs]
  if not rows or not rows[0].size:
    return Interval(*[float("nan")] * 3)
  return hierarchical_bootstrap(np.stack(rows))


def at_equal_identity(
  one: Sequence[Result], other: Sequence[Result], move: str
) -> tuple[float, float, float]:
  """(identity, leakage of `one`, of `other`) at the highest identity that both reach in training.

  Curves are means over the seeds. NaN where a curve has fewer than two points: nothing is known of
  the course of runs that were scored at their end alone, as on the test subjects.
  """
  curves = [curve(rows, move) for rows in (one, other)]
  if any(len(identity) < 2 for identity, _ in curves):
    return (float("nan"),) * 3
  level = min(identity.max() for identity, _ in curves)
  return level, *(at_equal(identity, value, level) for identity, value in curves)


def curve(rows: Sequence[Result], move: str) -> tuple[np.ndarray, np.ndarray]:
  """(identity, leakage of a factor) at every checkpoint, averaged over seeds."""
  steps = sorted({point["step"] for row in rows for point in row["curve"]})
  identity, leaks = [], []
  for step in steps:
    points = [point for row in rows for point in row["curve"] if point["step"] == step]
    values = [point["leakage"].get(move) for point in points]
    values = [value for value in values if value is not None]
    if values:
      identity.append(np.mean([point["fidelity"] for point in points]))
      leaks.append(np.mean(values))
  return np.asarray(identity), np.asarray(leaks)


def _pairs(arms: Arms) -> list[tuple[str, str]]:
  """Those of PAIRS whose arms are both there."""
  return [pair for pair in PAIRS if arms.keys() >= set(pair)]


def _by_round(row: Result, key: str) -> np.ndarray:
  """What each subject got, [rounds, n]."""
  return np.asarray([_row(one[key]) for one in row.get("rounds", [row["subjects"]])], float)


def _row(values: Sequence[float | None]) -> list[float]:
  return [np.nan if value is None else value for value in values]


def sweep(rows: Sequence[Result]) -> dict[float, tuple[float, float]]:
  """{scale: (fidelity, control)}, averaged over the seeds; empty for an arm that was not swept."""
  points = [point for row in rows for point in row.get("sweep") or ()]
  found: dict[float, list] = {}
  for point in points:
    found.setdefault(point["scale"], []).append((point["fidelity"], point["control"]))
  return {scale: tuple(np.mean(np.asarray(values, float), axis=0))
          for scale, values in sorted(found.items())}


def _layers(arms: Arms) -> list[str]:
  rows = [row for name, rows in arms.items() if name != BASE for row in rows]
  return list(dict.fromkeys(layer for row in rows for layer in row["features"]))


def _looked_at(arms: Arms) -> bool:
  """Whether these runs were scored by their features, too."""
  return any(row["features"] for rows in arms.values() for row in rows)


def _layer(row: Result, layer: str, get: Callable[[Mapping], float]) -> float | None:
  return get(row["features"][layer]) if layer in row["features"] else None


def _s_plus(row: Result) -> list[Mapping[str, Any]]:
  """What is known of each layer of S+; empty for an arm that has none."""
  return [value for name, value in row["features"].items() if name.startswith("layer")]


def probe(row: Result, factor: str) -> float | None:
  """A probe's score averaged over the layers of S+."""
  layers = _s_plus(row)
  return float(np.mean([layer["probes"][factor]["score"] for layer in layers])) if layers else None


def chance(arms: Arms, factor: str) -> float:
  """What a probe gets that knows nothing."""
  row = next(rows[0] for name, rows in arms.items() if name != BASE)
  return next(iter(row["features"].values()))["probes"][factor]["chance"]


def ridge_by(row: Result) -> str:
  """How the probes of a result chose their ridge; results that do not say it are old ones."""
  return row.get("ridge_by", "GCV")


def _trained(arms: Arms) -> Arms:
  """All but the base."""
  return {name: rows for name, rows in arms.items() if name != BASE}
