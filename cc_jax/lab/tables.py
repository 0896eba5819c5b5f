"""Tables and figures of the laboratory, from its result files alone: no model, no picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cc_jax import evaluate
from cc_jax.errors import UserError
from cc_jax.metrics.statistics import (
  Interval,
  at_equal,
  hierarchical_bootstrap,
  mean_of_known,
)

Result = dict[str, Any]
Arms = dict[str, list[Result]]  # by name, its seeds in order

METHOD, SELF, BASE = "method", "self_reconstruction", "base"
AGAINST = (SELF, "ip_adapter_plus")  # what the method is held against
# Side arms that are held against another arm than the method; two words in one would be unfair.
PAIRS = (("s_words_4", "self_s_words_4"), ("s_words_4", "multi_view_s_words_4"),
         ("multi_view_s_words_4", "self_s_words_4"), ("s_words_4", "ip_adapter_plus"),
         ("whole_frame", "whole_frame_self"))
FACTORS = ("class_id", "color1", "color2", "pattern", "pattern_color", "scene", "style", "hat")
MOVES = ("size", "place", "azimuth", "light", "scene")
INTRINSIC = ("class_id", "color1", "color2", "pattern", "pattern_color", "wide", "tall", "ratio")
IRRELEVANT = ("azimuth", "elevation", "roll", "size", "x", "y", "light_azimuth", "scene")
PROBED = (*INTRINSIC, *IRRELEVANT)
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#7f7f7f",
           "#bcbd22", "#17becf", "#000000", "#98df8a", "#ff9896", "#c5b0d5")


def report(results: Path, folder: Path, *, split: str = "validation",
           setting: str = "cut_outs") -> None:
  """Writes `tables.md` and the figures to `folder`; `setting` is said in the tables' first line.

  Raises:
    UserError: no results of this split, or of different budgets or scorings.
  """
  arms = load(results, split)
  folder.mkdir(parents=True, exist_ok=True)
  ending = "" if split == "validation" else f"-{split}"
  (folder / f"tables{ending}.md").write_text(tables(arms, split, setting))
  for name, draw in FIGURES.items():
    figure = draw(arms)
    if figure is not None:
      figure.savefig(folder / f"{name}{ending}.png", dpi=110, bbox_inches="tight")
  print(f"{folder}: tables{ending}.md and figures of {sum(map(len, arms.values()))} results")


def load(results: Path, split: str) -> Arms:
  """The results of a split, by arm, the best value of a tuned arm alone."""
  found = [json.loads(file.read_text()) for file in sorted(Path(results).glob("*.json"))]
  found = [result for result in found if result["split"] == split]
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


def leak(row: Result, move: str) -> float | None:
  """The mean leakage of one factor."""
  known = [value for value in row["leakage"].get(move, ()) if value is not None]
  return float(np.mean(known)) if known else None


def paired(
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


def _pairs(arms: Arms) -> list[tuple[str, str]]:
  """Those of PAIRS whose arms are both there."""
  return [pair for pair in PAIRS if arms.keys() >= set(pair)]


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
      cells.append(_spread(over_seeds(rows, lambda r: leak(r, move))))  # noqa: B023
    lines.append(cells)
  return markdown(head, lines)


def _differences(pairs: Sequence[tuple[str, Sequence[Result], Sequence[Result]]], said: str) -> str:
  """Paired differences: of each (name, one, other) what `one` has more than `other`."""
  head = [said, "seeds", "fidelity", "control", *(f"leak {move}" for move in MOVES)]
  lines = []
  for name, one, other in pairs:
    cells = [name, str(len({row["seed"] for row in one} & {row["seed"] for row in other}))]
    for key in ("fidelity", "control"):
      cells.append(_interval(paired(one, other, lambda r: _row(r["subjects"][key]))))  # noqa: B023
    for move in MOVES:
      cells.append(_interval(paired(one, other, lambda r: _row(r["leakage"].get(move, ())))))  # noqa: B023
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
        cells.append(_interval(paired(
          arms[name], arms[other], lambda r: mean_of_known(_by_round(r, key)[part]))))  # noqa: B023
      lines.append(cells)
  return ["## The same, of some of the rounds",
          f"Each subject was drawn {count} times, with other references, prompts and noise.",
          markdown(["arm", "rounds", "fidelity", "control"], lines)]


def _by_size(arms: Arms, split: str) -> str:
  """Does an arm keep or obey less where the reference is small, or large?"""
  rounds, count = _by_round(next(iter(arms.values()))[0], "fidelity").shape
  size = np.stack([evaluate.reference_factors(split, count, n)[0].size for n in range(rounds)])
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
        of = paired(arms[METHOD], rows, lambda r: get(r, *column))  # noqa: B023
        cells[-1] += "" if np.isnan(of.mean) else f" [{of.low:+.3f}, {of.high:+.3f}]"
    lines.append(cells)
  for name, other in _pairs(arms):
    lines.append([f"{name} less {other}", *(
      _interval(paired(arms[name], arms[other], lambda r: get(r, *column)))  # noqa: B023
      for column in columns)])
  return markdown(head, lines)


def _by_round(row: Result, key: str) -> np.ndarray:
  """What each subject got, [rounds, n]."""
  return np.asarray([_row(one[key]) for one in row.get("rounds", [row["subjects"]])], float)


def _row(values: Sequence[float | None]) -> list[float]:
  return [np.nan if value is None else value for value in values]


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
        of = paired(arms[METHOD], rows, lambda r: _row(r["subjects"][key]))  # noqa: B023
        text = f"[{of.low:+.3f}, {of.high:+.3f}]"
        cells[-1] += f" **{text}**" if of.excludes_zero else f" {text}"
    for key in ("spearman", "recall"):
      best = over_seeds(rows, lambda r: max((x[key] for x in _s_plus(r)), default=None))  # noqa: B023
      cells.append(_number(best.mean()))
    lines.append(cells)
  return markdown(head, lines)


def sweep(rows: Sequence[Result]) -> dict[float, tuple[float, float]]:
  """{scale: (fidelity, control)}, averaged over the seeds; empty for an arm that was not swept."""
  points = [point for row in rows for point in row.get("sweep") or ()]
  found: dict[float, list] = {}
  for point in points:
    found.setdefault(point["scale"], []).append((point["fidelity"], point["control"]))
  return {scale: tuple(np.mean(np.asarray(values, float), axis=0))
          for scale, values in sorted(found.items())}


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


def ridge_by(row: Result) -> str:
  """How the probes of a result chose their ridge; results that do not say it are old ones."""
  return row.get("ridge_by", "GCV")


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


# ---- figures


def tradeoff(arms: Arms) -> Figure:
  """Identity over control, a point per seed, with the curves over the adapter's scale.

  Of side arms those with several seeds are shown.
  """
  figure = Figure(figsize=(7.5, 5.5))
  axes = figure.subplots()
  several = {name: rows for name, rows in arms.items() if len(rows) > 1}
  for color, (name, rows) in zip(_cycle(), (_shown(arms) | several).items()):
    x = over_seeds(rows, lambda r: r["scores"]["control"])
    y = over_seeds(rows, lambda r: r["scores"]["fidelity"])
    axes.scatter(x, y, color=color, s=26, label=name, marker="s" if name == BASE else "o")
    line = {scale: point[::-1] for scale, point in sweep(rows).items()}
    if line:
      axes.plot(*zip(*line.values()), color=color, alpha=0.6)
    for scale, point in line.items():
      axes.annotate(f"{scale:g}", point, fontsize=7, color=color)
  axes.set(xlabel="text control", ylabel="subject fidelity",
           title="Trade-off; lines: one seed, over the adapter's scale")
  if axes.has_data():
    axes.legend(fontsize=8)
  axes.grid(alpha=0.3)
  return figure


def leakage_course(arms: Arms) -> Figure | None:
  """Leakage against identity over the course of training: a slow adapter is no decoupled one.

  None where no run was scored on its way.
  """
  if all(len(row["curve"]) < 2 for rows in arms.values() for row in rows):
    return None
  figure = Figure(figsize=(11, 4.4))
  for axes, move in zip(figure.subplots(1, 2), ("size", "place")):
    for color, (name, rows) in zip(_cycle(), _shown(arms).items()):
      identity, leaks = curve(rows, move)
      if len(identity):
        axes.plot(identity, leaks, "o-", ms=4, color=color, label=name)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="subject fidelity", ylabel=f"leakage of {move}", title=f"{move}: 1 = copied")
    axes.grid(alpha=0.3)
  axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
  figure.tight_layout()
  return figure


def leakage_bars(arms: Arms) -> Figure | None:
  """Leakage of every factor at the end; None where it was not measured."""
  values = {name: {move: over_seeds(rows, lambda r: leak(r, move)) for move in MOVES}  # noqa: B023
            for name, rows in _trained(_shown(arms)).items()}
  return _bars(values, "leakage by intervention (0 = not copied, 1 = copied)") if values else None


def likeness(arms: Arms) -> Figure | None:
  """Spearman correlation with real similarity, per layer; None where no features were looked at."""
  if not _looked_at(arms):
    return None
  figure = Figure(figsize=(8, 4.4))
  axes, names = figure.subplots(), _layers(arms)
  for color, (name, rows) in zip(_cycle(), arms.items()):
    if name == BASE or rows[0]["family"] not in ("core", "scaling"):
      continue
    shown = [layer for layer in names if all(layer in row["features"] for row in rows)]
    values = [np.mean([row["features"][layer]["spearman"] for row in rows]) for layer in shown]
    style = "o-" if rows[0]["family"] == "core" else "s--"
    axes.plot(shown, values, style, ms=4, label=name, color=color)
  axes.tick_params("x", rotation=20)
  axes.axhline(0.6, color="black", lw=0.8, ls=":")
  axes.set(ylabel="Spearman correlation", title="Learned similarity against real similarity")
  axes.legend(fontsize=7, ncols=2)
  axes.grid(alpha=0.3)
  return figure


def probes(arms: Arms) -> Figure | None:
  """What linear probes read in S+, with chance as a line; None as for `likeness`."""
  if not _looked_at(arms):
    return None
  figure = Figure(figsize=(11, 7))
  groups = (("intrinsic: high is good", INTRINSIC), ("irrelevant: chance is good", IRRELEVANT))
  for axes, (title, factors) in zip(figure.subplots(2, 1), groups):
    values = {name: {factor: over_seeds(rows, lambda r: probe(r, factor))  # noqa: B023
                     for factor in factors}
              for name, rows in _shown(arms).items()
              if name != BASE and any(map(_s_plus, rows))}
    _draw_bars(axes, values, title)
    for place, factor in enumerate(factors):
      axes.plot([place - 0.42, place + 0.42], [chance(arms, factor)] * 2, color="black", lw=1.2)
    axes.set_ylim(bottom=-0.1)  # R² below that is as worthless as 0
  figure.tight_layout()
  return figure


FIGURES: dict[str, Callable[[Arms], Figure | None]] = {
  "tradeoff": tradeoff, "leakage_course": leakage_course, "leakage": leakage_bars,
  "likeness": likeness, "probes": probes,
}


def _trained(arms: Arms) -> Arms:
  """All but the base."""
  return {name: rows for name, rows in arms.items() if name != BASE}


def _shown(arms: Arms) -> Arms:
  """Core arms, controls and the base: what a figure has room for."""
  return {name: rows for name, rows in arms.items()
          if rows[0]["family"] in ("core", "control", "base")}


def _cycle():
  while True:
    yield from _COLORS


def _bars(values: Mapping[str, Mapping[str, np.ndarray]], title: str) -> Figure:
  figure = Figure(figsize=(9, 4.2))
  _draw_bars(figure.subplots(), values, title)
  return figure


def _draw_bars(axes, values: Mapping[str, Mapping[str, np.ndarray]], title: str) -> None:
  """A group of bars per factor, one bar per arm, a dot per seed."""
  factors = list(next(iter(values.values())))
  width = 0.84 / len(values)
  for number, (color, (name, row)) in enumerate(zip(_cycle(), values.items())):
    x = np.arange(len(factors)) - 0.42 + width * (number + 0.5)
    known = [row[factor][~np.isnan(row[factor])] for factor in factors]
    axes.bar(x, [v.mean() if len(v) else 0 for v in known], width * 0.9, color=color, label=name,
             alpha=0.75)
    for place, seeds in zip(x, known):
      axes.plot([place] * len(seeds), seeds, ".", color="black", ms=3)
  axes.set_xticks(range(len(factors)), factors)
  axes.axhline(0, color="black", lw=0.8)
  axes.set_title(title)
  axes.legend(fontsize=7, ncols=3)
  axes.grid(axis="y", alpha=0.3)
