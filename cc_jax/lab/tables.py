"""Tables and figures of the laboratory, from its result files alone: no model, no picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cc_jax.lab.comparison import (
  BASE,
  METHOD,
  MOVES,
  PROBED,
  SELF,
  Arms,
  Result,
  _by_round,
  _layer,
  _layers,
  _looked_at,
  _pairs,
  _row,
  _s_plus,
  _trained,
  at_equal_identity,
  chance,
  mean_leakage,
  over_seeds,
  paired_difference,
  probe,
  ridge_by,
  sweep,
)
from cc_jax.lab.trials import reference_factors
from cc_jax.metrics.statistics import Interval, mean_of_known

FACTORS = ("class_id", "color1", "color2", "pattern", "pattern_color", "scene", "style", "hat")


# ---- tables


def tables(arms: Arms, split: str, setting: str) -> str:
  """The markdown file."""
  options = f"--split={split} --config=configs/lab.py:{setting}"
  row = next(rows[0] for name, rows in arms.items() if name != BASE)
  parts = [
    "# Tables of the laboratory",
    f"Made by `python -m cc_jax.lab --suite=report {options}` from `results/`: "
    f"{sum(map(len, arms.values()))} runs of {row['steps']} steps, {split} subjects, base "
    f"`{row['base']}`, world and scoring `{row['fingerprint']}`; {_machines(arms)}.",
    "## What is drawn", _scores(arms),
    "## The method less another arm, subject by subject",
    "95 % intervals: hierarchical bootstrap over seeds and subjects, same prompts and noise. An "
    "arm with one seed is held against each seed of the method.",
    _differences([(name, arms[METHOD], rows) for name, rows in _trained(arms).items()
                  if METHOD in arms and name != METHOD], "against"),
    "## Arms with several seeds less self-reconstruction, in the same way",
    _differences([(name, rows, arms[SELF]) for name, rows in _trained(arms).items()
                  if SELF in arms and name != SELF and len(rows) > 1], "arm"),
    "## Other pairs, in the same way",
    _differences([(f"{name} less {other}", arms[name], arms[other])
                  for name, other in _pairs(arms)], "arms"),
    *_rounds(arms),
    "## Side arms: what each changes, and what comes of it",
    "Likeness and recall@1 of the best layer of S+; in brackets the 95 % interval of the method "
    "(all its seeds) less the arm.", _side(arms),
    "## By the size of the subject in its reference",
    "Means of the smallest, middle and largest third of the references; in brackets the 95 % "
    "interval of the method less the arm.", _by_size(arms, split),
    "## Trade-off: swept over the adapter's scale",
    "First seed, the first subjects; the last column holds every point against the method at "
    "scale 1 in the same sweep.", _swept(arms),
    "## Leakage at equal identity",
    "Where the trainings first reach the identity that both reach; see `leakage_course.png`. Their "
    "ratio where the other arm leaks at all (0.05).", _equal(arms),
    *(_features(arms) if _looked_at(arms) else ()),
  ]
  return "\n\n".join(parts) + "\n"


def _features(arms: Arms) -> list[str]:
  """The tables of what S+ knows."""
  return [
    "## Likeness: Spearman correlation of S+ with the real similarity of subjects",
    _per_layer(arms, lambda layer: layer["spearman"]),
    "## Retrieval: recall@1 from another view", _per_layer(arms, lambda layer: layer["recall"]),
    "## Distances of S+ within a subject and between subjects (1 less the cosine), and their ratio",
    _per_layer(arms, lambda layer: layer["within"], lambda layer: layer["between"],
               lambda layer: layer["ratio"]),
    "## Linear probes: what a layer knows, and what it should not know",
    "Share of right answers (labels, azimuth in 8 bins) or R² (numbers); mean over S+'s layers. "
    "How the ridge was chosen: by folds of subjects, or by generalised cross-validation (GCV, "
    "until 27 November 2026), which overfits the numbers.", _probes(arms),
    "## Linear probes of core arms, layer by layer", _probes_by_layer(arms),
  ]


def _machines(arms: Arms) -> str:
  spent = sum(row["seconds"] for rows in arms.values() for row in rows)
  kinds = sorted({row["machine"] for rows in arms.values() for row in rows})
  return f"{spent / 3600:.1f} hours on {'; '.join(kinds)}"


def _scores(arms: Arms) -> str:
  head = ["arm", "family", "seeds", "fidelity", "control", *FACTORS, *(f"leak {m}" for m in MOVES)]
  lines = []
  for name, rows in arms.items():
    cells = [name + ("" if rows[0]["tuned"] is None else f" ({rows[0]['tuned']:g})"),
             rows[0]["family"], str(len(rows))]
    for key in ("fidelity", "control", *FACTORS):
      cells.append(_spread(over_seeds(rows, lambda r: r["scores"].get(key))))  # noqa: B023
    for move in MOVES:
      cells.append(_spread(over_seeds(rows, lambda r: mean_leakage(r, move))))  # noqa: B023
    lines.append(cells)
  return markdown(head, lines)


def _differences(pairs: Sequence[tuple[str, Sequence[Result], Sequence[Result]]], said: str) -> str:
  """Paired differences: of each (name, one, other) what `one` has more than `other`."""
  head = [said, "seeds", "fidelity", "control", *(f"leak {move}" for move in MOVES)]
  lines = []
  for name, one, other in pairs:
    cells = [name, str(len({row["seed"] for row in one} & {row["seed"] for row in other}))]
    for key in ("fidelity", "control"):
      cells.append(_interval(paired_difference(one, other, lambda r: _row(r["subjects"][key]))))  # noqa: B023
    for move in MOVES:
      cells.append(_interval(paired_difference(one, other, lambda r: _row(r["leakage"].get(move, ())))))  # noqa: B023
    lines.append(cells)
  return markdown(head, lines)


def _rounds(arms: Arms) -> list[str]:
  """The same differences round by round, where subjects were drawn more than once."""
  count = min(len(row.get("rounds", ())) for rows in arms.values() for row in rows)
  if count < 2:
    return []
  parts = {"all": slice(None), "the first": slice(1), "the others": slice(1, None)}
  lines = []
  for name, other in _pairs(arms):
    for said, part in parts.items():
      cells = [f"{name} less {other}", said]
      for key in ("fidelity", "control"):
        cells.append(_interval(paired_difference(
          arms[name], arms[other], lambda r: mean_of_known(_by_round(r, key)[part]))))  # noqa: B023
      lines.append(cells)
  return ["## The same, of some of the rounds",
          f"Each subject was drawn {count} times, with other references, prompts and noise.",
          markdown(["arm", "rounds", "fidelity", "control"], lines)]


def _by_size(arms: Arms, split: str) -> str:
  """Does an arm keep or obey less where the reference is small, or large?"""
  rounds, count = _by_round(next(iter(arms.values()))[0], "fidelity").shape
  size = np.stack([reference_factors(split, count, n)[0].size for n in range(rounds)])
  third = np.empty(size.size, int)
  for number, rows in enumerate(np.array_split(np.argsort(size, axis=None, kind="stable"), 3)):
    third[rows] = number
  third = third.reshape(size.shape)

  def get(row: Result, key: str, number: int) -> np.ndarray:
    """Each subject's mean over those of its references that belong to this third."""
    return mean_of_known(np.where(third == number, _by_round(row, key), np.nan))

  columns = [(key, number) for key in ("fidelity", "control") for number in range(3)]
  head = ["arm", *(f"{key}, {('small', 'middle', 'large')[number]}" for key, number in columns)]
  lines = []
  for name, rows in arms.items():
    cells = [name]
    for column in columns:
      known = np.concatenate([get(row, *column) for row in rows])
      known = known[~np.isnan(known)]
      cells.append(f"{known.mean():.3f}" if len(known) else "–")
      if METHOD in arms and name not in (METHOD, BASE):
        of = paired_difference(arms[METHOD], rows, lambda r: get(r, *column))  # noqa: B023
        cells[-1] += "" if np.isnan(of.mean) else f" [{of.low:+.3f}, {of.high:+.3f}]"
    lines.append(cells)
  for name, other in _pairs(arms):
    lines.append([f"{name} less {other}", *(
      _interval(paired_difference(arms[name], arms[other], lambda r: get(r, *column)))  # noqa: B023
      for column in columns)])
  return markdown(head, lines)


def _swept(arms: Arms) -> str:
  """Fidelity / control at every scale, and which points lie above the method on both axes."""
  curves = {name: sweep(rows) for name, rows in arms.items()}
  curves = {name: points for name, points in curves.items() if points}
  if not curves or METHOD not in arms:
    return "no arm was swept"
  own = curves.get(METHOD, {}).get(1.0)
  scales = list(next(iter(curves.values())))
  lines = []
  for name, points in curves.items():
    above = [f"{s:g}" for s, (fidelity, control) in points.items()
             if own and fidelity > own[0] and control > own[1]]
    lines.append([name, *(f"{points[s][0]:.3f} / {points[s][1]:.3f}" for s in scales),
                  (", ".join(above) or "none") if own else "–"])
  head = ["fidelity / control at scale", *(f"{s:g}" for s in scales), "above the method on both"]
  return markdown(head, lines)


def _side(arms: Arms) -> str:
  head = ["family", "arm", "changes", "seeds", "fidelity", "control", "likeness", "recall@1"]
  lines = []
  for name, rows in arms.items():
    if rows[0]["family"] in ("core", "control", "base") and name != METHOD:
      continue
    changes = json.dumps(rows[0]["changes"])[1:-1].replace('"', "")
    cells = [rows[0]["family"], name, changes or "–", str(len(rows))]
    for key in ("fidelity", "control"):
      cells.append(f"{np.nanmean(over_seeds(rows, lambda r: r['scores'][key])):.3f}")  # noqa: B023
      if METHOD in arms and name != METHOD:
        of = paired_difference(arms[METHOD], rows, lambda r: _row(r["subjects"][key]))  # noqa: B023
        text = f"[{of.low:+.3f}, {of.high:+.3f}]"
        cells[-1] += f" **{text}**" if of.excludes_zero else f" {text}"
    for key in ("spearman", "recall"):
      best = over_seeds(rows, lambda r: max((x[key] for x in _s_plus(r)), default=None))  # noqa: B023
      cells.append(_number(best.mean()))
    lines.append(cells)
  return markdown(head, lines)


def _equal(arms: Arms) -> str:
  head = ["arm", "against", "factor", "identity", "arm", "other", "arm over other"]
  pairs = [(METHOD, name) for name, rows in arms.items()
           if METHOD in arms and name != METHOD and rows[0]["family"] in ("core", "control")]
  lines = []
  for name, against in pairs + _pairs(arms):
    for move in ("size", "place"):
      level, own, other = at_equal_identity(arms[name], arms[against], move)
      ratio = own / other if other > 0.05 else float("nan")
      if not np.isnan(level):
        numbers = (_number(value) for value in (level, own, other, ratio))
        lines.append([name, against, move, *numbers])
  return markdown(head, lines) if lines else "These runs were not scored on their way."


def _per_layer(arms: Arms, *gets: Callable[[Mapping], float]) -> str:
  """A column per layer; of several numbers the means alone, with slashes between them."""
  names = _layers(arms)
  lines = []
  for name, rows in arms.items():
    if name == BASE:
      continue
    cells = []
    for layer in names:
      values = [over_seeds(rows, lambda r: _layer(r, layer, get)) for get in gets]  # noqa: B023
      if len(gets) == 1 or np.isnan(values[0]).all():
        cells.append(_spread(values[0]))
      else:
        cells.append(" / ".join(f"{value.mean():.3f}" for value in values))
    lines.append([name, *cells])
  return markdown(["arm", *names], lines)


def _probes(arms: Arms) -> str:
  lines = [["chance", "–", *(_number(chance(arms, factor)) for factor in PROBED)]]
  trained = [row for name, rows in arms.items() if name != BASE for row in rows]
  for how, row in {ridge_by(row): row for row in trained[::-1]}.items():  # equal in all arms
    frozen = row["features"]["image encoder"]["probes"]
    lines.append(["image encoder", how, *(_number(frozen[factor]["score"]) for factor in PROBED)])
  for name, rows in arms.items():
    if name != BASE:
      how = ", ".join(sorted({ridge_by(row) for row in rows}))
      lines.append([name, how, *(_spread(over_seeds(rows, lambda r: probe(r, factor)))  # noqa: B023
                                 for factor in PROBED)])
  return markdown(["arm", "ridge by", *PROBED], lines)


def _probes_by_layer(arms: Arms) -> str:
  lines = []
  for name, rows in arms.items():
    for layer in _layers(arms) if rows[0]["family"] == "core" else ():
      values = [over_seeds(rows, lambda r: _layer(r, layer, lambda x: x["probes"][factor]["score"]))  # noqa: B023
                for factor in PROBED]
      if not np.isnan(values[0]).all():
        lines.append([name, layer, *(_number(value.mean()) for value in values)])
  return markdown(["arm", "layer", *PROBED], lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A table."""
  rows = [head, ["---"] * len(head), *lines]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(value: float) -> str:
  return "–" if np.isnan(value) else f"{value:.3f}"


def _spread(values: np.ndarray) -> str:
  """Mean, and the standard deviation over seeds where there are several."""
  values = values[~np.isnan(values)]
  if len(values) == 0:
    return "–"
  return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _interval(interval: Interval) -> str:
  if np.isnan(interval.mean):
    return "–"
  text = f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
  return f"**{text}**" if interval.excludes_zero else text
