"""Trains a CustomContrast adapter on a frozen base.

    python -m cc_jax.train --config=configs/subjects3d.py --workdir=runs/first
    python -m cc_jax.train --config=... --workdir=... --config.train.steps=3000
    python -m cc_jax.train --config=configs/sd15.py --abstract

The same command again goes on where the run stopped, on any number of devices and processes.
`--abstract` needs no weights: it prints the parameter table and ends. On several machines the same
command runs on each (cc_jax.parallel.rules.join). Read from the top down: `train` is the whole story.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from ml_collections import config_flags

import data_pipeline
from cc_jax import errors
from cc_jax.bases import base as hub
from cc_jax.customcontrast.adapter_file import save_adapter
from cc_jax.customcontrast.build import Params, abstractly, assemble
from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.customcontrast.ip_adapter import warm_start
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.parallel import rules as sharding
from cc_jax.training import preemption
from cc_jax.training import prompt_sensitivity as gaps
from cc_jax.training.checkpoint import Checkpoints, config_changes, jsonable
from cc_jax.training.step import Method, TrainState, init_state, make_train_step
from cc_jax.training.telemetry import Profile, Telemetry, align
from data_pipeline.subjects3d.factors import SCENES
from data_pipeline.tokens import empty_prompt

DTYPES = ("float32", "bfloat16")


class Views(NamedTuple):
  """What looks at the model while it trains, and after; None looks away. cc_jax.evaluate has both.

  Each gets (config, base, the model with averaged weights, the file or folder to write).
  """

  draw: Callable[[ml_collections.ConfigDict, hub.Base, CustomContrast, epath.Path], None] | None
  finish: Callable[[ml_collections.ConfigDict, hub.Base, CustomContrast, epath.Path], None] | None


BLIND = Views(None, None)


def train(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  views: Views = BLIND,
  profile_steps: tuple[int, int] = (0, 0),
) -> TrainState:
  """Trains until config.train.steps, from the latest checkpoint in `workdir` if there is one.

  Args:
    workdir: a folder or a bucket's URL, the same for all processes.
    profile_steps: the first and last step of a trace in workdir/profile; (0, 0) = none.

  Raises:
    UserError: a mistake in the config, the base or the checkpoint; a workdir that cannot be
      written; max_bad_steps losses in a row that are not finite; processes that did not join.
    SystemExit: 143 after SIGTERM, when the state is saved.
  """
  check(config)
  workdir, settings = epath.Path(workdir), config.train
  sharding.set_cpu_devices(config.mesh, settings.batch_size)
  processes = sharding.join(config.mesh)
  checkpoints = Checkpoints(
    workdir / "checkpoints", keep=settings.keep, keep_every=settings.keep_every
  )
  mesh = sharding.make_mesh(config.mesh, settings.batch_size)
  leader = jax.process_index() == 0

  # The base and the adapter, read and made where they shall lie; from here on, plain pytrees.
  encoder, injection = networks(config)
  base = hub.load_base(config.base, sharding=sharding.by_name(mesh), **storage(config))
  born = sharding.born(mesh)
  definition, trainable, frozen = assemble(
    base, encoder, injection, dtype=settings.dtype, seed=config.seed, transform=born
  )
  report = None
  if settings.warm_start and checkpoints.latest_step() is None:
    trainable, report = warm_start(sharding.gathered(trainable), settings.warm_start)
    trainable = sharding.put(trainable, mesh)
  method = make_method(config, definition, base)
  state = born(functools.partial(init_state, config=config))(trainable)
  sharding.check({"state": state, "frozen": frozen}, mesh)

  # Where the last run stopped.
  start, sums = 0, None
  if checkpoints.latest_step() is not None:
    state, record = checkpoints.restore(state, base_hash=base.hash, config=config)
    start, sums = record["step"], record["telemetry"]
    for key, (before, now) in config_changes(record["config"], config).items():
      if leader:
        print(f"config change since step {start}: {key} was {before!r}, is {now!r}")
  log = Telemetry(
    workdir,
    start=start,
    steps=settings.steps,
    every=settings.log_every,
    batch_size=settings.batch_size,
    chips=mesh.size,
    sums=sums,
    writes=leader,
  )
  for text in (processes, f"mesh {dict(mesh.shape)}" if processes or sharding.cuts(mesh) else ""):
    if text:
      log.say(text)
  if sharding.cuts(mesh):
    parts = {"trained": state.trainable, "optimizer": state.opt_state, "average": state.ema}
    log.say(sharding.describe(parts | {"frozen": frozen}, mesh))
  log.say(f"{_count(trainable)} trained, {_count(frozen)} frozen parameters; {mesh.size} devices")
  if report:
    log.say(report.summary())
    if leader:
      (workdir / "warm_start.txt").write_text(str(report))

  def model() -> CustomContrast:
    return method.model(state.ema, frozen)

  def save(step: int) -> None:
    record = {"base_hash": base.hash, "config": jsonable(config), "telemetry": log.state()}
    checkpoints.save(step, state, record)

  def collect(step: int, metrics: Any, ids: dict[str, np.ndarray]) -> None:
    """Fetches one step's numbers, which waits for that step, and stops a run that went wrong."""
    metrics = jax.device_get(metrics)
    log.step(step, metrics)
    if not metrics["bad_steps"]:
      return
    file = log.dump(step, ids, metrics)
    if metrics["bad_steps"] >= settings.max_bad_steps:
      raise UserError(
        f"loss or gradient is not finite, {int(metrics['bad_steps'])} steps in a row up to step "
        f"{step}; {_left(checkpoints)}; lower train.learning_rate, look at the data (subjects and "
        f"norms are in {file}), or raise train.max_bad_steps to skip such steps"
      )

  profile = Profile(workdir / "profile", profile_steps)
  try:
    if start < settings.steps:
      with log.spent("starting"):
        batches = make_batches(config, base, config.seed, start, mesh)
        rows = next(batches)
        batch = sharding.put_batch(rows, mesh)
        seed = sharding.put(seed_of(config), mesh)
      with log.spent("compiling"):
        log.say("compiling the training step ...")
        for line in method.describe_contrast(mesh, trainable, frozen):
          log.say(line)
        began = time.perf_counter()
        step_fn = make_train_step(method, mesh, state, frozen)
        step_fn = step_fn.lower(state, frozen, batch, seed).compile()
        log.say(f"compiled in {time.perf_counter() - began:.0f} s")
        count_work(log, step_fn, mesh)
      with log.spent("starting"):
        measure_gaps = make_gaps(config, base, method, mesh) if settings.gaps_every else None

    pending = None  # the metrics of the step before, fetched while this one runs
    with preemption.Preemption() as preempted:
      for step in range(start + 1, settings.steps + 1):
        profile.before(step)
        with jax.transfer_guard("disallow"):  # what the step needs lies on the devices
          state, metrics = step_fn(state, frozen, batch, seed)
        profile.after(step, metrics)
        if pending:
          collect(*pending)
        pending = step, metrics, {key: ids for key, ids in rows.items() if key.endswith("_id")}
        if step < settings.steps:  # the next batch goes to the devices while they are at work
          began = time.perf_counter()
          rows = next(batches)
          batch = sharding.put_batch(rows, mesh)
          if metrics["loss"].is_ready():  # the devices had nothing to do while we waited for data
            log.waited(time.perf_counter() - began)

        # The log of this step is complete before its checkpoint is: a restart cuts it back to that.
        stops = preempted.stops_after(step)
        looks = due(step, settings.gaps_every, settings.sample_every)
        saves = stops or due(step, settings.save_every, settings.steps)
        if looks or saves:
          collect(*pending)
          pending = None
        if looks:
          with log.spent("looking"):
            if due(step, settings.gaps_every):
              log.write(step, measure_gaps(state.ema, frozen))
            if due(step, settings.sample_every):
              look(views.draw, config, base, model, workdir / "samples" / f"{step:07d}.png", log)
        if saves:
          with log.spent("saving"):
            save(step)
        if stops:
          checkpoints.wait()
          log.say(f"SIGTERM: step {step} is saved; the same command goes on from there")
          raise SystemExit(preemption.EXIT_CODE)
    checkpoints.wait()
  finally:
    profile.close()
    log.close()
    checkpoints.close()

  adapter = sharding.gathered(state.ema)
  if leader:
    save_adapter(
      workdir / "adapter.safetensors",
      adapter,
      encoder=encoder,
      injection=injection,
      base_name=base.name,
      base_hash=base.hash,
      notes={
        "steps": str(int(state.step)),
        "data": f"{config.data.source} {config.data.name}",
        # How references are shown: generate.Pipeline.shown reads it.
        "reference_share": str(config.data.reference_share),
        "reference_place": config.data.reference_place,
      },
    )
  look(views.finish, config, base, model, workdir, log)
  return state


def look(view: Callable | None, config, base, model: Callable, place: epath.Path, log) -> None:
  """Calls one of the Views. With several processes nobody has the whole model: see `evaluate`."""
  if view is None:
    return
  if jax.process_count() > 1:
    log.say(f"no pictures from several processes: python -m cc_jax.evaluate draws {place.name}")
    return
  view(config, base, model(), place)


def count_work(log: Telemetry, step: Any, mesh: jax.sharding.Mesh) -> None:
  """Tells the log what utilisation is measured by, where the chip's peak is known."""
  from cc_jax.plan import (
    chips,  # lazily: only accelerators need them
    hlo,
  )

  chip = chips.find(mesh.devices.flat[0].device_kind)
  if chip is not None:
    log.program(hlo.Program(step.as_text()).flops, chip.flops)


def networks(config: ml_collections.ConfigDict) -> tuple[MFIEncoderConfig, InjectionConfig]:
  """The adapter's two sections, checked. Raises UserError for a wrong key, type or choice."""
  return MFIEncoderConfig.from_config(config.encoder), InjectionConfig.from_config(config.injection)


def storage(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """How the base is computed with and kept."""
  return dict(
    dtype=jnp.dtype(config.train.dtype),
    param_dtype=jnp.dtype(config.train.base_dtype),
    image_encoder=config.encoder.image_encoder or None,
  )


def make_method(
  config: ml_collections.ConfigDict, definition: nnx.GraphDef, base: hub.Base
) -> Method:
  """What the step knows besides arrays."""
  if base.tokenizers:
    empty = tuple(int(i) for i in empty_prompt(base.tokenizers[0]))
  else:  # known architectures have none (`without_weights`); the words matter to no plan
    empty = (0,) * base.text_encoders[0].config.max_position_embeddings
  schedule = NoiseSchedule.from_config(base.scheduler_config)
  return Method(definition, schedule, ml_collections.FrozenConfigDict(config), empty)


def seed_of(config: ml_collections.ConfigDict) -> np.ndarray:
  """The seed as the step takes it."""
  return np.asarray(config.seed % 2**32, np.uint32)


def make_batches(
  config: ml_collections.ConfigDict,
  base: hub.Base,
  seed: int,
  start: int,
  mesh: jax.sharding.Mesh,
) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of every batch from step `start` on."""
  return data_pipeline.make_loader(
    config.data,
    base.tokenizers[0],
    batch_size=config.train.batch_size,
    seed=seed,
    start_step=start,
    rows=sharding.local_rows(mesh, config.train.batch_size),
    s_words=config.encoder.s_words,
  )


def make_gaps(
  config: ml_collections.ConfigDict, base: hub.Base, method: Method, mesh: jax.sharding.Mesh
) -> Callable[[Params, Params], dict[str, float]]:
  """Wrong-word gaps on one batch that training does not see: class noun, and scene if there is."""
  batch = next(make_batches(config, base, config.seed + 1, 0, mesh))
  tokenizer, words = base.tokenizers[0], config.encoder.s_words
  wrong = {
    "class": gaps.wrong_nouns(batch, tokenizer, words),
    "scene": gaps.wrong_phrases(batch, SCENES, tokenizer, words),
  }
  return gaps.make_gaps(method, mesh, batch, wrong)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for values of config.train that make no sense; others check their own."""
  settings = config.train
  for key in ("steps", "batch_size", "accumulate", "log_every", "max_bad_steps", "keep"):
    if settings[key] < 1:
      raise UserError(f"train.{key} is {settings[key]}; it must be at least 1")
  every = ("save_every", "keep_every", "sample_every", "gaps_every")
  for key in ("warmup_steps", "weight_decay", *every):
    if settings[key] < 0:
      raise UserError(f"train.{key} is {settings[key]}; it must not be negative")
  for key in ("ema", "beta1", "beta2"):
    if not 0 <= settings[key] < 1:
      raise UserError(f"train.{key} is {settings[key]}; it must lie in [0, 1)")
  for key in ("dtype", "base_dtype"):
    if settings[key] not in DTYPES:
      raise UserError(f"train.{key} is {settings[key]!r}; use one of {', '.join(DTYPES)}")


def due(step: int, *every: int) -> bool:
  """Whether `step` is a multiple of one of `every`; 0 stands for never."""
  return any(n and step % n == 0 for n in every)


def table(config: ml_collections.ConfigDict) -> str:
  """The parameter table of a config: `--abstract`; see `without_weights`."""
  config, base, (_, trainable, frozen) = without_weights(config)
  NoiseSchedule.from_config(base.scheduler_config)
  state = jax.eval_shape(lambda t: init_state(t, config), trainable)
  rows = [("part", "", "tensors", "parameters", "MiB")]
  for kind, params in (("trained", trainable), ("frozen", frozen)):
    parts: dict[str, list] = {}
    for path, value in params.items():
      names = path.split(".")
      parts.setdefault(".".join(names[:2] if names[0] == "mfi_encoder" else names[:1]), []).append(
        value
      )
    rows += [(part, kind, *_sizes(values)) for part, values in parts.items()]
    rows.append(("all", kind, *_sizes(params.values())))
  rows.append(("optimizer", "state", *_sizes(jax.tree.leaves(state.opt_state))))
  rows.append(("average", "state", *_sizes(jax.tree.leaves(state.ema))))
  return align(rows, left=2)


def without_weights(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, hub.Base, tuple[nnx.GraphDef, Params, Params]]:
  """(config with the folders that are read, abstract base, what `assemble` makes of it).

  The base needs no weights, and a known one not even a folder: its config.json files lie in
  assets/architectures.
  """
  check(config)
  config = config.copy_and_resolve_references()
  config.base = _known(config.base)
  config.encoder.image_encoder = _known(config.encoder.image_encoder)
  base = hub.abstract_base(config.base, **storage(config))
  parts = assemble(base, *networks(config), dtype=config.train.dtype, transform=abstractly)
  return config, base, parts


def _known(folder: str) -> str:
  """The folder itself, or, if it is not there, the one with the shapes of the model it names."""
  shapes = hub.ASSETS / "architectures" / folder
  return str(shapes) if folder and not epath.Path(folder).is_dir() and shapes.is_dir() else folder


def _sizes(arrays) -> tuple[str, str, str]:
  arrays = list(arrays)
  total = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays)
  return (
    str(len(arrays)),
    f"{sum(int(np.prod(x.shape)) for x in arrays):,}",
    f"{total / 2**20:,.1f}",
  )


def _count(params: Params) -> str:
  return f"{sum(x.size for x in params.values()):,}"


def _left(checkpoints: Checkpoints) -> str:
  step = checkpoints.latest_step()
  return "no checkpoint yet" if step is None else f"the checkpoint of step {step} is intact"


def keep_compiled(workdir: epath.Path) -> None:
  """Compiled programs are kept in the workdir: a run that goes on there starts at once.

  A folder for each kind of processor, since XLA compiles for the very one. JAX's own settings, such
  as JAX_COMPILATION_CACHE_DIR, come first.
  """
  if jax.config.jax_compilation_cache_dir is None:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    features = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    machine = platform.machine() + (features[0] if features else platform.processor())
    folder = workdir / "compiled" / hashlib.sha256(machine.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(folder))


def parse_steps(text: str) -> tuple[int, int]:
  """'10:15' -> (10, 15); '' -> (0, 0). Raises UserError for anything else."""
  found = re.fullmatch(r"(\d+):(\d+)", text or "0:0")
  if not found or int(found[1]) > int(found[2]):
    raise UserError(f"--profile_steps={text}: give the first and last step, e.g. 10:15")
  return int(found[1]), int(found[2])


def main(argv: Sequence[str]) -> None:
  """The command line."""
  del argv
  config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
  if flags.FLAGS.abstract:
    print(table(config))
    return
  if not workdir:
    raise UserError("no --workdir given; name a folder for checkpoints and logs")
  profile_steps = parse_steps(flags.FLAGS.profile_steps)
  keep_compiled(epath.Path(workdir))
  from cc_jax import evaluate  # lazily: it imports the judge and the plots

  train(config, workdir, Views(evaluate.draw, evaluate.finish), profile_steps)


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "configs/subjects3d.py")
  flags.DEFINE_string("workdir", "", "Folder of checkpoints, logs and the adapter.")
  flags.DEFINE_string("profile_steps", "", "FIRST:LAST step of a trace in the workdir.")
  flags.DEFINE_bool("abstract", False, "Print the parameter table and end; needs no weights.")


if __name__ == "__main__":
  errors.run(main, define_flags)
