"""The laboratory: trains and scores every variant of the method, and draws tables and figures.

    python -m cc_jax.lab --suite=ablation            # all arms of configs/lab.py, then the report
    python -m cc_jax.lab --suite=ablation --arms=core,control   # some families, or single arms
    python -m cc_jax.lab --suite=ablation --fast     # toy base, two steps, every table and figure
    python -m cc_jax.lab --suite=sweep               # only the arms swept over the adapter's scale
    python -m cc_jax.lab --suite=report              # tables and figures from the result files
    python -m cc_jax.lab --suite=pictures --checkpoint=runs/lab/method-0 \\
        --against=runs/lab/self_reconstruction-0     # the paper's pictures

Each run ends in one small JSON file under docs/lab/results, which is committed. The suite skips
runs whose file is there, on any machine, and a run that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from ml_collections import config_flags

from cc_jax import errors
from cc_jax.bases import base as hub
from cc_jax.errors import UserError
from cc_jax.lab import judge as judging
from cc_jax.lab.scorer import Scorer, of_base
from cc_jax.parallel import rules as sharding
from cc_jax.train import Views, keep_compiled, train
from configs import lab as table
from data_pipeline.subjects3d.factors import SPLITS, VERSION

FIGURES = Path("docs/lab")  # with results/ inside; another setting has a folder in there
ALL_SEEDS = ("core", "control")  # families that run with every seed
# How a run is scored: results that differ in one of these cannot be compared.
_SCORED = ("split", "subjects", "styled", "hatted", "interventions", "curve_subjects",
           "curve_interventions", "probe_subjects", "probe_views", "timestep")
# Networks of the shipped base, shrunk: what `--fast` trains on.
_TOY = {
  "unet": dict(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
               attention_head_dim=2, addition_embed_type_num_heads=2),
  "vae": dict(block_out_channels=(4, 8, 8), norm_num_groups=2),
  "text_encoder": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2, projection_dim=16),
  "image_encoder": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, projection_dim=16, patch_size=16),
}


# ---- which runs there are


def arm_config(
  config: ml_collections.ConfigDict, name: str, seed: int, tuned: Any = None
) -> ml_collections.ConfigDict:
  """The laboratory's config with an arm's changes in `run`; `tuned` is the value of its `tune` key.

  Raises:
    UserError: an arm or a key that does not exist.
  """
  if name not in table.ARMS:
    raise UserError(f"arm {name!r} is unknown; configs/lab.py has {', '.join(table.ARMS)}")
  arm, config = table.ARMS[name], config.copy_and_resolve_references()
  changes = dict(arm.changes) | ({arm.tune[0]: tuned} if tuned is not None else {})
  for key in changes:
    section, _, field = key.partition(".")
    if field not in config.run.get(section, {}):
      raise UserError(f"arm {name!r} changes {key}, which configs/subjects3d.py does not have")
  try:
    config.run.update_from_flattened_dict({**changes, "seed": seed})
  except (TypeError, ValueError) as error:
    raise UserError(f"arm {name!r} has a value of a wrong type: {error}") from error
  # S+ takes its words from the textual queries.
  words = config.run.encoder.s_words
  config.run.encoder.textual_queries = max(words, config.run.encoder.textual_queries)
  return config


def plan(config: ml_collections.ConfigDict, names: Sequence[str], results: Path,
         candidates: int = 0) -> Iterator[tuple[str, int, Any]]:
  """(arm, seed, tuned value) of every run, in the order of `names`.

  An arm to be tuned first runs every candidate (at most `candidates`, 0 = all) with the first seed;
  the best, by fidelity plus control, runs the other seeds: so results must be written meanwhile.
  The validation subjects choose, whatever the split.

  Raises:
    UserError: an unknown arm, or one to be tuned that has no validation results to choose by.
  """
  for name in names:
    if name not in table.ARMS:
      raise UserError(f"arm {name!r} is unknown; configs/lab.py has {', '.join(table.ARMS)}")
    arm = table.ARMS[name]
    first, *others = config.seeds if arm.family in ALL_SEEDS else config.side_seeds
    if arm.tune is None:
      yield from ((name, seed, None) for seed in (first, *others))
      continue
    values, split = arm.tune[1][: candidates or None], config.score.split
    if split == "validation":
      yield from ((name, first, value) for value in values)
    files = {value: result_file(results, name, first, "validation", value) for value in values}
    found = {value: read(file) for value, file in files.items() if file.exists()}
    missing = [str(file) for value, file in files.items() if value not in found]
    # On the validation subjects all were just tried: one that is missing has failed, and is worst.
    if missing and (split != "validation" or not found):
      raise UserError(f"{missing[0]} is missing: run the suite on the validation subjects first")
    best = max(found, key=lambda value: tuning_score(found[value]))  # noqa: B023
    if split != "validation":
      yield name, first, best
    yield from ((name, seed, best) for seed in others)


def tuning_score(result: dict[str, Any]) -> float:
  """By what a tuned value is chosen."""
  return result["scores"]["fidelity"] + result["scores"]["control"]


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


def read(file: Path) -> dict[str, Any]:
  """A result."""
  return json.loads(file.read_text())


def write(file: Path, result: dict[str, Any]) -> None:
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
  found = read(file)
  if found["fingerprint"] != mark:
    raise UserError(
      f"{file} was made with another base, budget, config or scoring: nothing can be compared with "
      "it; give --results another folder, or remove it")
  if found["changes"] != changes:
    raise UserError(
      f"{file} is of an arm with the changes {found['changes']}, and that name now stands for "
      f"{changes}; give the new arm another name, or remove the file")
  return True


def run(config: ml_collections.ConfigDict, name: str, seed: int, tuned: Any, *, workdir: Path,
        results: Path, base: hub.Base) -> dict[str, Any]:
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
    return read(file)
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
      write(points / f"{step:07d}.json", look_with(base).on_the_way(model, step))

  def at_the_end(run_config, base, model, _) -> None:
    look = look_with(base)
    # One seed shows the curve; the others would cost as much as a training.
    swept = name in own.score.sweep_arms and seed == own.seeds[0]
    found = look.at_the_end(model, sweep=swept)
    curve = [read(point) for point in sorted(points.glob("*.json"))]
    curve.append(look.last_point(found, run_config.train.steps))
    write(file, dict(
      arm=name, family=arm.family, seed=seed, tuned=tuned, changes=changes,
      split=own.score.split, steps=run_config.train.steps, fingerprint=mark, base=base.hash[:16],
      machine=machine(), seconds=round(time.time() - began), **found, curve=curve))

  if arm.first is not None:
    first = first_part(own.run, *arm.first)
    if saved_step(place) < first.train.steps:
      train(first, epath.Path(place))
  train(own.run, epath.Path(place), Views(on_the_way, at_the_end))
  return read(file)


def saved_step(place: Path) -> int:
  """The step of the last checkpoint in a run's folder, 0 where there is none."""
  return max((int(p.name) for p in place.glob("checkpoints/*") if p.name.isdigit()), default=0)


def changes_of(arm: table.Arm) -> dict[str, Any]:
  """What an arm changes, as its result file says it."""
  changes = dict(arm.changes) | ({"first": arm.first} if arm.first else {})
  return json.loads(json.dumps(changes))  # which has lists for tuples


def first_part(
  config: ml_collections.ConfigDict, share: float, changes: dict[str, Any]
) -> ml_collections.ConfigDict:
  """The config of a run's first steps; the second part goes on from their checkpoint."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  config.train.steps = max(1, round(share * config.train.steps))
  config.train.schedule = "constant"  # a cosine would end here
  return config


def run_base(config: ml_collections.ConfigDict, *, results: Path, base: hub.Base) -> dict[str, Any]:
  """The base without adapter as one more result: every score stands beside it."""
  file, mark = result_file(results, "base", 0, config.score.split), fingerprint(config, base.hash)
  if not is_done(file, mark, {}):
    began = time.time()
    found = of_base(config, base)
    write(file, dict(
      arm="base", family="base", seed=0, tuned=None, changes={}, split=config.score.split, steps=0,
      fingerprint=mark, base=base.hash[:16], machine=machine(),
      seconds=round(time.time() - began), **found, curve=[]))
  return read(file)


def machine() -> str:
  """On what a run was made."""
  kind, cores = jax.devices()[0].device_kind, os.cpu_count()
  return f"{jax.device_count()} x {kind} ({cores} cores, {platform.machine()})"


# ---- the suites


def suite(config: ml_collections.ConfigDict, names: Sequence[str], *, workdir: Path, results: Path,
          candidates: int = 0) -> None:
  """Every run of `names` that has no result yet, the base first.

  Raises:
    UserError: runs that failed (a rate at which the loss is not finite, say), when all others are
      done; the same command tries them again.
  """
  base, failed = hub.load_base(config.run.base), []
  run_base(config, results=results, base=base)
  for name, seed, tuned in plan(config, names, results, candidates):
    file = result_file(results, name, seed, config.score.split, tuned)
    known = file.exists()
    try:
      found = run(config, name, seed, tuned, workdir=workdir, results=results, base=base)
    except UserError as error:
      failed.append(f"{file.stem}: {error}")
      print(failed[-1], flush=True)
      continue
    scores, spent = found["scores"], "was there" if known else f"{found['seconds']} s"
    print(f"{file.stem}: fidelity {scores['fidelity']:.3f}, control {scores['control']:.3f}, "
          f"{spent}", flush=True)
  if failed:
    raise UserError(f"{len(failed)} run(s) failed, the others are done; the first: {failed[0]}")


def toy_base(folder: Path) -> Path:
  """The shipped base's kind with random weights and a few thousand parameters: for `--fast`."""
  if (folder / "model_index.json").exists():
    return folder
  shipped, part = hub.ASSETS / "subjects3d-base", folder.with_name(folder.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(shipped, part, ignore=shutil.ignore_patterns("*.safetensors"))
  for name, changes in _TOY.items():
    file = part / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  rng = np.random.default_rng(0)

  def fill(leaf):  # by numpy: jax would compile an initialiser for every shape
    return jnp.asarray(rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5, leaf.dtype)

  for name, module in hub.abstract_base(part).networks.items():
    definition, state = nnx.split(module)
    hub.save_module(nnx.merge(definition, jax.tree.map(fill, state)), part / name)
  os.replace(part, folder)
  return folder


def chosen_arms(given: Sequence[str]) -> list[str]:
  """`given` with every family's name replaced by those of its arms."""
  names = []
  for one in given:
    names += [name for name, arm in table.ARMS.items() if one in (name, arm.family)] or [one]
  return list(dict.fromkeys(names))


def fast_arms() -> list[str]:
  """One arm of every family, and of the core ones those that figures compare."""
  chosen = {"method": "core", "self_reconstruction": "core", "ip_adapter_plus": "core"}
  for name, arm in table.ARMS.items():
    if arm.family not in chosen.values():
      chosen[name] = arm.family
  return list(chosen)


def define_flags() -> None:
  """The command's flags."""
  config_flags.DEFINE_config_file("config", "configs/lab.py")
  flags.DEFINE_enum("suite", "ablation", ["ablation", "sweep", "report", "pictures"],
                    "What is done.")
  flags.DEFINE_bool("fast", False, "A toy base, two steps, one arm per family: does it all run?")
  flags.DEFINE_list("arms", [], "Arms or families of configs/lab.py's ARMS; all by default.")
  flags.DEFINE_integer("candidates", 0, "Values tried of an arm that is tuned; 0 = all.")
  flags.DEFINE_integer("budget", None, "Training steps of every run; config.run.train.steps.")
  flags.DEFINE_string("split", None, "validation (default) or test: once, at the end.")
  flags.DEFINE_string("workdir", None, "Checkpoints and adapters of the runs; runs/lab by default.")
  flags.DEFINE_string("results", None, f"Where results lie; {FIGURES}/results by default.")
  flags.DEFINE_string("figures", None, f"Where tables and figures go; {FIGURES} by default.")
  flags.DEFINE_string("checkpoint", None, "pictures: an adapter file or a run's folder.")
  flags.DEFINE_string("against", None, "pictures: another, beside it where two are shown.")


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  f = flags.FLAGS
  config = f.config
  own = "" if config.setting == "cut_outs" else config.setting
  workdir = Path(f.workdir or Path("runs/lab", own))
  results = Path(f.results or (workdir if f.fast else FIGURES / own) / "results")
  figures = Path(f.figures or (workdir / "figures" if f.fast else FIGURES / own))
  if f.fast:
    table.fast(config)
    # Compiling is what takes the time: it does little, and no run repeats what another did.
    if version("jaxlib").startswith("0.10."):  # XLA's older emitters compile in 2/5 of the time
      old = "--xla_cpu_use_fusion_emitters=false"
      os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {old}".strip()
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  if f.budget is not None:
    config.run.train.steps = f.budget
  config.score.split = f.split or config.score.split
  if config.score.split not in SPLITS:
    raise UserError(f"--split={config.score.split} is unknown; use one of {', '.join(SPLITS)}")
  from cc_jax.lab import pictures as lab_pictures  # lazily: matplotlib
  from cc_jax.lab import tables as lab_report

  if f.suite != "report":
    sharding.set_cpu_devices(config.run.mesh, config.run.train.batch_size)
    keep_compiled(epath.Path(workdir))
    workdir.mkdir(parents=True, exist_ok=True)
  if f.fast and f.suite != "report":
    config.run.base = str(toy_base(workdir / "toy_base"))
  if f.suite in ("ablation", "sweep"):
    names = chosen_arms(f.arms) or list(config.score.sweep_arms if f.suite == "sweep" else
                                 fast_arms() if f.fast else table.ARMS)
    suite(config, names, workdir=workdir, results=results, candidates=1 if f.fast else f.candidates)
  if f.suite != "pictures":
    lab_report.report(results, figures, split=config.score.split, setting=config.setting)
  if f.suite == "pictures" or f.fast and f.suite == "ablation":
    checkpoint, against = f.checkpoint, f.against
    if f.fast and checkpoint is None:
      checkpoint, against = workdir / "method-0", workdir / "self_reconstruction-0"
    if checkpoint is None:
      raise UserError("--suite=pictures needs --checkpoint, a run's folder: runs/lab/method-0")
    lab_pictures.pictures(config, checkpoint, against, figures)


if __name__ == "__main__":
  errors.run(main, define_flags)
