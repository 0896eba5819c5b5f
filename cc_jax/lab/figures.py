"""Figures of the laboratory, from its result files alone."""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure

from cc_jax.lab import comparison
from cc_jax.lab.comparison import BASE, INTRINSIC, IRRELEVANT, MOVES, Arms, over_seeds

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#7f7f7f",
           "#bcbd22", "#17becf", "#000000", "#98df8a", "#ff9896", "#c5b0d5")


def tradeoff(arms: Arms) -> Figure:
  """Identity over control, a point per seed, with the curves over the adapter's scale.

  Of side arms those with several seeds are shown.
  """
  figure = Figure(figsize=(7.5, 5.5))
  axes = figure.subplots()
  several = {name: rows for name, rows in arms.items() if len(rows) > 1}
  for color, (name, rows) in zip(itertools.cycle(_COLORS), (_main_arms(arms) | several).items()):
    x, y = (over_seeds(rows, comparison.score, key) for key in ("control", "fidelity"))
    axes.scatter(x, y, color=color, s=26, label=name, marker="s" if name == BASE else "o")
    line = {scale: point[::-1] for scale, point in comparison.sweep(rows).items()}
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
    for color, (name, rows) in zip(itertools.cycle(_COLORS), _main_arms(arms).items()):
      identity, leakage = comparison.curve(rows, move)
      if len(identity):
        axes.plot(identity, leakage, "o-", ms=4, color=color, label=name)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="subject fidelity", ylabel=f"leakage of {move}", title=f"{move}: 1 = copied")
    axes.grid(alpha=0.3)
  axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
  figure.tight_layout()
  return figure


def leakage_bars(arms: Arms) -> Figure | None:
  """Leakage of every factor at the end; None where only the base has results."""
  values = {name: {move: over_seeds(rows, comparison.mean_leakage, move) for move in MOVES}
            for name, rows in comparison.trained_arms(_main_arms(arms)).items()}
  if not values:
    return None
  figure = Figure(figsize=(9, 4.2))
  _draw_bars(figure.subplots(), values, "leakage by intervention (0 = not copied, 1 = copied)")
  return figure


def likeness(arms: Arms) -> Figure | None:
  """Spearman correlation with real similarity, per layer; None where no features were scored."""
  if not comparison.has_features(arms):
    return None
  figure = Figure(figsize=(8, 4.4))
  axes, names = figure.subplots(), comparison.layer_names(arms)
  for color, (name, rows) in zip(itertools.cycle(_COLORS), arms.items()):
    if name == BASE or rows[0]["family"] not in ("core", "scaling"):
      continue
    layers = [layer for layer in names if all(layer in row["features"] for row in rows)]
    values = [np.mean([row["features"][layer]["spearman"] for row in rows]) for layer in layers]
    style = "o-" if rows[0]["family"] == "core" else "s--"
    axes.plot(layers, values, style, ms=4, label=name, color=color)
  axes.tick_params("x", rotation=20)
  axes.axhline(0.6, color="black", lw=0.8, ls=":")
  axes.set(ylabel="Spearman correlation", title="Learned similarity against real similarity")
  axes.legend(fontsize=7, ncols=2)
  axes.grid(alpha=0.3)
  return figure


def probes(arms: Arms) -> Figure | None:
  """What linear probes read in S+, with chance as a line; None as for `likeness`."""
  if not comparison.has_features(arms):
    return None
  figure = Figure(figsize=(11, 7))
  groups = (("intrinsic: high is good", INTRINSIC), ("irrelevant: chance is good", IRRELEVANT))
  arms_with_s_plus = {name: rows for name, rows in comparison.trained_arms(_main_arms(arms)).items()
                      if any(map(comparison.s_plus_layers, rows))}
  for axes, (title, factors) in zip(figure.subplots(2, 1), groups):
    values = {name: {factor: over_seeds(rows, comparison.probe, factor) for factor in factors}
              for name, rows in arms_with_s_plus.items()}
    _draw_bars(axes, values, title)
    for x, factor in enumerate(factors):
      level = comparison.chance(arms, factor)
      axes.plot([x - 0.42, x + 0.42], [level] * 2, color="black", lw=1.2)
    axes.set_ylim(bottom=-0.1)  # R² below that is as worthless as 0
  figure.tight_layout()
  return figure


FIGURES: dict[str, Callable[[Arms], Figure | None]] = {
  "tradeoff": tradeoff, "leakage_course": leakage_course, "leakage": leakage_bars,
  "likeness": likeness, "probes": probes,
}


def _main_arms(arms: Arms) -> Arms:
  """Core arms, controls and the base: what a figure has room for."""
  return {name: rows for name, rows in arms.items()
          if rows[0]["family"] in ("core", "control", "base")}


def _draw_bars(axes, values: Mapping[str, Mapping[str, np.ndarray]], title: str) -> None:
  """A group of bars per factor, one bar per arm, a dot per seed."""
  factors = list(next(iter(values.values())))
  width = 0.84 / len(values)
  colors = itertools.cycle(_COLORS)
  for number, (color, (name, of_factor)) in enumerate(zip(colors, values.items())):
    x = np.arange(len(factors)) - 0.42 + width * (number + 0.5)
    known = [of_factor[factor][~np.isnan(of_factor[factor])] for factor in factors]
    axes.bar(x, [v.mean() if len(v) else 0 for v in known], width * 0.9, color=color, label=name,
             alpha=0.75)
    for place, seeds in zip(x, known):
      axes.plot([place] * len(seeds), seeds, ".", color="black", ms=3)
  axes.set_xticks(range(len(factors)), factors)
  axes.axhline(0, color="black", lw=0.8)
  axes.set_title(title)
  axes.legend(fontsize=7, ncols=3)
  axes.grid(axis="y", alpha=0.3)
