"""Tables of the laboratory in markdown, from its result files; no network is loaded or run.

Sizes of references are not in the files: `trials.reference_factors` draws the factors again.
"""

import json
from collections.abc import Sequence

import numpy as np

from cc_jax.cli import with_current_names
from cc_jax.lab import comparison
from cc_jax.lab.comparison import BASE, METHOD, MOVES, PROBED, SELF, Arms, Result, over_seeds
from cc_jax.lab.trials import reference_factors
from cc_jax.metrics.statistics import Interval, mean_of_known

difference = comparison.paired_difference
FACTORS = ("class_id", "color1", "color2", "pattern", "pattern_color", "scene", "style", "hat")
SCORES = ("fidelity", "control")


def tables(arms: Arms, split: str, setting: str) -> str:
  """The markdown file."""
  options = f"--split={split} --config=configs/lab.py:{setting}"
  trained = comparison.trained_arms(arms)
  row = next(iter(trained.values()))[0]
  parts = [
    "# Tables of the laboratory",
    f"Made by `python -m cc_jax.lab --suite=report {options}` from `results/`: "
    f"{sum(map(len, arms.values()))} runs of {row['steps']} steps, {split} subjects, base "
    f"`{row['base']}`, world and scoring `{row['fingerprint']}`; {_machines(arms)}.",
    "## What is drawn", _scores(arms),
    "## The method less another arm, subject by subject",
    "95 % intervals: hierarchical bootstrap over seeds and subjects, same prompts and noise. An "
    "arm with one seed is held against each seed of the method.",
    _differences([(name, arms[METHOD], rows) for name, rows in trained.items()
                  if METHOD in arms and name != METHOD], "against"),
    "## Arms with several seeds less self-reconstruction, in the same way",
    _differences([(name, rows, arms[SELF]) for name, rows in trained.items()
                  if SELF in arms and name != SELF and len(rows) > 1], "arm"),
    "## Other pairs, in the same way",
    _differences([(f"{name} less {other}", arms[name], arms[other])
                  for name, other in comparison.known_pairs(arms)], "arms"),
    *_rounds(arms),
    "## Side arms: what each changes, and what comes of it",
    "Likeness and recall@1 of the best layer of S+; in brackets the 95 % interval of the method "
    "(all its seeds) less the arm.", _side_arms(arms),
    "## By the size of the subject in its reference",
    "Means of the smallest, middle and largest third of the references; in brackets the 95 % "
    "interval of the method less the arm.", _by_size(arms, split),
    "## Trade-off: swept over the adapter's scale",
    "First seed, the first subjects; the last column holds every point against the method at "
    "scale 1 in the same sweep.", _sweeps(arms),
    "## Leakage at equal identity",
    "Where the trainings first reach the identity that both reach; see `leakage_course.png`. Their "
    "ratio where the other arm leaks at all (0.05).", _at_equal_identity(arms),
    *(_features(arms) if comparison.has_features(arms) else ()),
  ]
  return "\n\n".join(parts) + "\n"


def _features(arms: Arms) -> list[str]:
  """The tables of what S+ knows."""
  return [
    "## Likeness: Spearman correlation of S+ with the real similarity of subjects",
    _per_layer(arms, "spearman"),
    "## Retrieval: recall@1 from another view", _per_layer(arms, "recall"),
    "## Distances of S+ within a subject and between subjects (1 less the cosine), and their ratio",
    _per_layer(arms, "within", "between", "ratio"),
    "## Linear probes: what a layer knows, and what it should not know",
    "Share of right answers (labels, azimuth in 8 bins) or R² (numbers); mean over S+'s layers. "
    "How the ridge was chosen: by folds of subjects, or by generalised cross-validation (GCV, "
    "until 27 November 2026), which overfits the numbers.", _probes(arms),
    "## Linear probes of core arms, layer by layer", _probes_by_layer(arms),
  ]


def _machines(arms: Arms) -> str:
  seconds = sum(row["seconds"] for rows in arms.values() for row in rows)
  kinds = sorted({row["machine"] for rows in arms.values() for row in rows})
  return f"{seconds / 3600:.1f} hours on {'; '.join(kinds)}"


def _scores(arms: Arms) -> str:
  lines = []
  for name, rows in arms.items():
    label = name + ("" if rows[0]["tuned"] is None else f" ({rows[0]['tuned']:g})")
    values = [over_seeds(rows, comparison.score, key) for key in (*SCORES, *FACTORS)]
    values += [over_seeds(rows, comparison.mean_leakage, move) for move in MOVES]
    lines.append([label, rows[0]["family"], str(len(rows)), *map(_spread, values)])
  head = ["arm", "family", "seeds", *SCORES, *FACTORS, *(f"leak {move}" for move in MOVES)]
  return markdown(head, lines)


def _differences(pairs: Sequence[tuple[str, Sequence[Result], Sequence[Result]]],
                 title: str) -> str:
  """Paired differences: of each (name, rows, others) `rows` less `others`."""
  lines = []
  for name, rows, others in pairs:
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in others}
    of_scores = [difference(rows, others, comparison.subject_scores, key) for key in SCORES]
    of_leaks = [difference(rows, others, comparison.subject_leakage, move) for move in MOVES]
    lines.append([name, str(len(seeds)), *map(_interval, of_scores + of_leaks)])
  return markdown([title, "seeds", *SCORES, *(f"leak {move}" for move in MOVES)], lines)


def _rounds(arms: Arms) -> list[str]:
  """The same differences round by round, where subjects were drawn more than once."""
  count = min(len(row.get("rounds", ())) for rows in arms.values() for row in rows)
  if count < 2:
    return []

  def mean_of_rounds(row: Result, key: str, rounds: slice) -> np.ndarray:
    return mean_of_known(comparison.scores_by_round(row, key)[rounds])

  parts = {"all": slice(None), "the first": slice(1), "the others": slice(1, None)}
  lines = []
  for name, other in comparison.known_pairs(arms):
    for label, part in parts.items():
      differences = (difference(arms[name], arms[other], mean_of_rounds, key, part)
                     for key in SCORES)
      lines.append([f"{name} less {other}", label, *map(_interval, differences)])
  return ["## The same, of some of the rounds",
          f"Each subject was drawn {count} times, with other references, prompts and noise.",
          markdown(["arm", "rounds", *SCORES], lines)]


def _by_size(arms: Arms, split: str) -> str:
  """Does an arm keep or obey less where the reference is small, or large?"""
  rounds, count = comparison.scores_by_round(next(iter(arms.values()))[0], "fidelity").shape
  size = np.stack([reference_factors(split, count, n)[0].size for n in range(rounds)])
  third = np.empty(size.size, int)
  for number, places in enumerate(np.array_split(np.argsort(size, axis=None, kind="stable"), 3)):
    third[places] = number
  third = third.reshape(size.shape)

  def mean_of_third(row: Result, key: str, number: int) -> np.ndarray:
    """Each subject's mean over those of its references that belong to this third."""
    return mean_of_known(np.where(third == number, comparison.scores_by_round(row, key), np.nan))

  columns = [(key, number) for key in SCORES for number in range(3)]
  lines = []
  for name, rows in arms.items():
    lines.append([name])
    for column in columns:
      known = np.concatenate([mean_of_third(row, *column) for row in rows])
      known = known[~np.isnan(known)]
      cell = f"{known.mean():.3f}" if len(known) else "–"
      if METHOD in arms and name not in (METHOD, BASE):
        interval = difference(arms[METHOD], rows, mean_of_third, *column)
        cell += "" if np.isnan(interval.mean) else f" {_limits(interval)}"
      lines[-1].append(cell)
  for name, other in comparison.known_pairs(arms):
    differences = (difference(arms[name], arms[other], mean_of_third, *column)
                   for column in columns)
    lines.append([f"{name} less {other}", *map(_interval, differences)])
  labels = ("small", "middle", "large")
  return markdown(["arm", *(f"{key}, {label}" for key in SCORES for label in labels)], lines)


def _sweeps(arms: Arms) -> str:
  """Fidelity / control at every scale, and which points lie above the method on both axes."""
  curves = {name: comparison.sweep(rows) for name, rows in arms.items()}
  curves = {name: points for name, points in curves.items() if points}
  if not curves or METHOD not in arms:
    return "no arm was swept"
  at_one = curves.get(METHOD, {}).get(1.0)
  scales = list(next(iter(curves.values())))
  lines = []
  for name, points in curves.items():
    above = [f"{s:g}" for s, (fidelity, control) in points.items()
             if at_one and fidelity > at_one[0] and control > at_one[1]]
    lines.append([name, *(f"{points[s][0]:.3f} / {points[s][1]:.3f}" for s in scales),
                  (", ".join(above) or "none") if at_one else "–"])
  head = ["fidelity / control at scale", *(f"{s:g}" for s in scales), "above the method on both"]
  return markdown(head, lines)


def _side_arms(arms: Arms) -> str:
  lines = []
  for name, rows in arms.items():
    if rows[0]["family"] in ("core", "control", "base") and name != METHOD:
      continue
    changes = json.dumps(with_current_names(rows[0]["changes"]))[1:-1].replace('"', "")
    cells = [rows[0]["family"], name, changes or "–", str(len(rows))]
    for key in SCORES:
      cell = f"{np.nanmean(over_seeds(rows, comparison.score, key)):.3f}"
      if METHOD in arms and name != METHOD:
        interval = difference(arms[METHOD], rows, comparison.subject_scores, key)
        bold = "**" if interval.excludes_zero else ""
        cell += f" {bold}{_limits(interval)}{bold}"
      cells.append(cell)
    layers = [comparison.s_plus_layers(row) for row in rows]
    for key in ("spearman", "recall"):
      best = [max((layer[key] for layer in seed), default=np.nan) for seed in layers]
      cells.append(_number(np.mean(best)))
    lines.append(cells)
  return markdown(["family", "arm", "changes", "seeds", *SCORES, "likeness", "recall@1"], lines)


def _at_equal_identity(arms: Arms) -> str:
  pairs = [(METHOD, name) for name, rows in arms.items()
           if METHOD in arms and name != METHOD and rows[0]["family"] in ("core", "control")]
  lines = []
  for name, against in pairs + comparison.known_pairs(arms):
    for move in ("size", "place"):
      level, leak, other = comparison.at_equal_identity(arms[name], arms[against], move)
      ratio = leak / other if other > 0.05 else float("nan")
      if not np.isnan(level):
        lines.append([name, against, move, *map(_number, (level, leak, other, ratio))])
  head = ["arm", "against", "factor", "identity", "arm", "other", "arm over other"]
  return markdown(head, lines) if lines else "These runs were not scored on their way."


# ---- what S+ knows


def _per_layer(arms: Arms, *keys: str) -> str:
  """A column per layer; of several scores the means alone, with slashes between them."""
  names = comparison.layer_names(arms)
  lines = []
  for name, rows in comparison.trained_arms(arms).items():
    lines.append([name])
    for layer in names:
      scores = [over_seeds(rows, comparison.layer_score, layer, key) for key in keys]
      if len(keys) == 1 or np.isnan(scores[0]).all():
        lines[-1].append(_spread(scores[0]))
      else:
        lines[-1].append(" / ".join(f"{score.mean():.3f}" for score in scores))
  return markdown(["arm", *names], lines)


def _probes(arms: Arms) -> str:
  lines = [["chance", "–", *(_number(comparison.chance(arms, factor)) for factor in PROBED)]]
  trained = comparison.trained_arms(arms)
  rows = [row for rows in trained.values() for row in rows]
  for ridge, row in {_ridge_by(row): row for row in rows[::-1]}.items():
    scores = (comparison.layer_probe(row, "image encoder", factor) for factor in PROBED)
    lines.append(["image encoder", ridge, *map(_number, scores)])  # equal in all arms
  for name, rows in trained.items():
    ridges = ", ".join(sorted(set(map(_ridge_by, rows))))
    probes = (over_seeds(rows, comparison.probe, factor) for factor in PROBED)
    lines.append([name, ridges, *map(_spread, probes)])
  return markdown(["arm", "ridge by", *PROBED], lines)


def _ridge_by(row: Result) -> str:
  return row.get("ridge_by", "GCV")  # the first results do not say it


def _probes_by_layer(arms: Arms) -> str:
  lines = []
  for name, rows in arms.items():
    for layer in comparison.layer_names(arms) if rows[0]["family"] == "core" else ():
      values = [over_seeds(rows, comparison.layer_probe, layer, factor) for factor in PROBED]
      if not np.isnan(values[0]).all():
        lines.append([name, layer, *(_number(value.mean()) for value in values)])
  return markdown(["arm", "layer", *PROBED], lines)


# ---- cells


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
  text = f"{interval.mean:+.3f} {_limits(interval)}"
  return f"**{text}**" if interval.excludes_zero else text


def _limits(interval: Interval) -> str:
  return f"[{interval.low:+.3f}, {interval.high:+.3f}]"
