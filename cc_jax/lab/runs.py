"""Trains and scores the runs of a suite."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from etils import epath

from cc_jax.bases.base import Base, load_base
from cc_jax.errors import UserError
from cc_jax.lab.arms import arm_config, changes_of, first_phase, list_runs
from cc_jax.lab.fingerprint import fingerprint, is_done
from cc_jax.lab.results import read_result, result_file, write_result
from cc_jax.lab.scorer import Scorer, of_base
from cc_jax.training.loop import Callbacks, train
from configs import lab as table


def run_arm(config: ml_collections.ConfigDict, name: str, seed: int, tuned: Any, *, workdir: Path,
        results: Path, base: Base) -> dict[str, Any]:
  """Trains and scores one arm with one seed, unless its result is there already; returns it.

  On the way it is scored at every multiple of train.sample_every; these points lie in the run's
  folder, so that a run that goes on after a kill need not make them again. Other splits than
  validation train nothing.

  Raises:
    UserError: the run failed, or is not there to be scored on another split.
  """
  file = result_file(results, name, seed, config.score.split, tuned)
  arm, mark = table.ARMS[name], fingerprint(config, base.hash)
  changes = changes_of(arm)
  if is_done(file, mark, changes):
    return read_result(file)
  own = arm_config(config, name, seed, tuned)
  place = workdir / result_file(Path(), name, seed, "validation", tuned).stem
  if own.score.split != "validation" and saved_step(place) < own.run.train.steps:
    raise UserError(
      f"{place} has no checkpoint of step {own.run.train.steps}, and --split={own.score.split} "
      f"trains nothing: run {name} on the validation subjects first, or give its --workdir")
  points = place / f"curve-{own.score.split}-{mark}"
  scorer: list[Scorer] = []
  began = time.time()

  def look_with(base):
    if not scorer:
      scorer.append(Scorer(own, base))
    return scorer[0]

  def on_the_way(run_config, base, model, picture) -> None:
    step = int(Path(os.fspath(picture)).stem)
    if step < run_config.train.steps:  # the last one belongs to the end
      write_result(points / f"{step:07d}.json", look_with(base).on_the_way(model, step))

  def at_the_end(run_config, base, model, _) -> None:
    look = look_with(base)
    # One seed shows the curve; the others would cost as much as a training.
    swept = name in own.score.sweep_arms and seed == own.seeds[0]
    found = look.at_the_end(model, sweep=swept)
    curve = [read_result(point) for point in sorted(points.glob("*.json"))]
    curve.append(look.last_point(found, run_config.train.steps))
    write_result(file, dict(
      arm=name, family=arm.family, seed=seed, tuned=tuned, changes=changes,
      split=own.score.split, steps=run_config.train.steps, fingerprint=mark, base=base.hash[:16],
      machine=describe_machine(), seconds=round(time.time() - began), **found, curve=curve))

  if arm.first is not None:
    first = first_phase(own.run, *arm.first)
    if saved_step(place) < first.train.steps:
      train(first, epath.Path(place))
  train(own.run, epath.Path(place), Callbacks(on_the_way, at_the_end))
  return read_result(file)


def saved_step(place: Path) -> int:
  """The step of the last checkpoint in a run's folder, 0 where there is none."""
  return max((int(p.name) for p in place.glob("checkpoints/*") if p.name.isdigit()), default=0)


def run_base(config: ml_collections.ConfigDict, *, results: Path, base: Base) -> dict[str, Any]:
  """The base without adapter as one more result: every score stands beside it."""
  file, mark = result_file(results, "base", 0, config.score.split), fingerprint(config, base.hash)
  if not is_done(file, mark, {}):
    began = time.time()
    found = of_base(config, base)
    write_result(file, dict(
      arm="base", family="base", seed=0, tuned=None, changes={}, split=config.score.split, steps=0,
      fingerprint=mark, base=base.hash[:16], machine=describe_machine(),
      seconds=round(time.time() - began), **found, curve=[]))
  return read_result(file)


def describe_machine() -> str:
  """On what a run was made."""
  kind, cores = jax.devices()[0].device_kind, os.cpu_count()
  return f"{jax.device_count()} x {kind} ({cores} cores, {platform.machine()})"


# ---- the suites


def run_suite(config: ml_collections.ConfigDict, names: Sequence[str], *, workdir: Path, results: Path,
          candidates: int = 0) -> None:
  """Every run of `names` that has no result yet, the base first.

  Raises:
    UserError: runs that failed (a rate at which the loss is not finite, say), when all others are
      done; the same command tries them again.
  """
  base, failed = load_base(config.run.base), []
  run_base(config, results=results, base=base)
  for name, seed, tuned in list_runs(config, names, results, candidates):
    file = result_file(results, name, seed, config.score.split, tuned)
    known = file.exists()
    try:
      found = run_arm(config, name, seed, tuned, workdir=workdir, results=results, base=base)
    except UserError as error:
      failed.append(f"{file.stem}: {error}")
      print(failed[-1], flush=True)
      continue
    scores, spent = found["scores"], "was there" if known else f"{found['seconds']} s"
    print(f"{file.stem}: fidelity {scores['fidelity']:.3f}, control {scores['control']:.3f}, "
          f"{spent}", flush=True)
  if failed:
    raise UserError(f"{len(failed)} run(s) failed, the others are done; the first: {failed[0]}")
