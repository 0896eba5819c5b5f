"""Trains and scores the runs of a suite."""

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
from cc_jax.lab.arms import arm_config, changes_of, find_arm, first_phase, list_runs
from cc_jax.lab.fingerprint import fingerprint, is_done
from cc_jax.lab.results import read_result, result_file, write_result
from cc_jax.lab.run_scores import Scorer, of_base
from cc_jax.training.loop import Callbacks, train


def run_arm(config: ml_collections.ConfigDict, name: str, seed: int, tuned: Any, *, workdir: Path,
            results: Path, base: Base) -> dict[str, Any]:
  """Trains and scores one arm with one seed, unless its result exists; returns it.

  On the way it is scored at every multiple of train.sample_every; these points are kept in the
  run's folder for a run that goes on after a kill. Other splits than validation train nothing.

  Raises:
    UserError: the run failed, or has not finished and so cannot be scored on another split.
  """
  split = config.score.split
  file = result_file(results, name, seed, split, tuned)
  arm, suite = find_arm(name), fingerprint(config, base.hash)
  changes = changes_of(arm)
  if is_done(file, suite, changes):
    return read_result(file)
  config = arm_config(config, name, seed, tuned)
  steps = config.run.train.steps
  folder = workdir / result_file(Path(), name, seed, "validation", tuned).stem
  if split != "validation" and saved_step(folder) < steps:
    raise UserError(
      f"{folder} has no checkpoint of step {steps}, and --split={split} "
      f"trains nothing: run {name} on the validation subjects first, or give its --workdir")
  points = folder / f"curve-{split}-{suite}"
  start_time, scorer = time.time(), None

  def scorer_of(base) -> Scorer:
    nonlocal scorer
    scorer = scorer or Scorer(config, base)
    return scorer

  def score_point(run_config, base, model, picture) -> None:
    step = int(Path(os.fspath(picture)).stem)
    if step < steps:  # the last one belongs to the end
      write_result(points / f"{step:07d}.json", scorer_of(base).on_the_way(model, step))

  def score_end(run_config, base, model, _) -> None:
    # One seed shows the sweep; the others would cost as much as a training.
    swept = name in config.score.sweep_arms and seed == config.seeds[0]
    scores = scorer_of(base).at_the_end(model, sweep=swept)
    curve = [read_result(point) for point in sorted(points.glob("*.json"))]
    curve.append(scorer_of(base).last_point(scores, steps))
    write_result(file, dict(
      arm=name, family=arm.family, seed=seed, tuned=tuned, changes=changes,
      **_circumstances(split, steps, suite, base, start_time), **scores, curve=curve))

  if arm.first is not None:
    first = first_phase(config.run, *arm.first)
    if saved_step(folder) < first.train.steps:
      train(first, epath.Path(folder))
  train(config.run, epath.Path(folder), Callbacks(on_sample=score_point, on_finish=score_end))
  return read_result(file)


def saved_step(folder: Path) -> int:
  """The step of the last checkpoint in a run's folder, 0 where there is none."""
  return max((int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()), default=0)


def run_base(config: ml_collections.ConfigDict, *, results: Path, base: Base) -> dict[str, Any]:
  """Scores the base without adapter, to stand beside every other score; returns the result."""
  split, suite = config.score.split, fingerprint(config, base.hash)
  file = result_file(results, "base", 0, split)
  if not is_done(file, suite, {}):
    start_time = time.time()
    scores = of_base(config, base)
    write_result(file, dict(
      arm="base", family="base", seed=0, tuned=None, changes={},
      **_circumstances(split, 0, suite, base, start_time), **scores, curve=[]))
  return read_result(file)


def _circumstances(split: str, steps: int, suite: str, base: Base, start_time: float) -> dict:
  """What every result says of its run: split, budget, fingerprint, base, machine, seconds."""
  kind, cores = jax.devices()[0].device_kind, os.cpu_count()
  machine = f"{jax.device_count()} x {kind} ({cores} cores, {platform.machine()})"
  return dict(split=split, steps=steps, fingerprint=suite, base=base.hash[:16], machine=machine,
              seconds=round(time.time() - start_time))


def run_suite(config: ml_collections.ConfigDict, names: Sequence[str], *, workdir: Path,
              results: Path, candidates: int = 0) -> None:
  """Every run of `names` that has no result yet, the base first.

  Raises:
    UserError: runs that failed (a rate at which the loss is not finite, say), when all others are
      done; the same command tries them again.
  """
  base, failed = load_base(config.run.base), []
  run_base(config, results=results, base=base)
  for name, seed, tuned in list_runs(config, names, results, candidates):
    file = result_file(results, name, seed, config.score.split, tuned)
    existed = file.exists()
    try:
      result = run_arm(config, name, seed, tuned, workdir=workdir, results=results, base=base)
    except UserError as error:
      failed.append(f"{file.stem}: {error}")
      print(failed[-1], flush=True)
      continue
    scores, spent = result["scores"], "was there" if existed else f"{result['seconds']} s"
    print(f"{file.stem}: fidelity {scores['fidelity']:.3f}, control {scores['control']:.3f}, "
          f"{spent}", flush=True)
  if failed:
    raise UserError(f"{len(failed)} run(s) failed, the others are done; the first: {failed[0]}")
