"""The training loop. Read from the top down: `train` is the whole story."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from cc_jax.bases.base import Base, load_base
from cc_jax.customcontrast.adapter_file import save_adapter
from cc_jax.customcontrast.build import build_customcontrast
from cc_jax.customcontrast.ip_adapter import warm_start
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.errors import UserError
from cc_jax.parallel.distributed import initialize_distributed, set_cpu_devices
from cc_jax.parallel.mesh import gather_to_host, make_mesh, shard_batch
from cc_jax.parallel.report import check_sharding, describe_sharding
from cc_jax.parallel.rules import init_sharded, param_sharding_fn, shard_params, shards_params
from cc_jax.training import preemption
from cc_jax.training.checkpoint import Checkpoints, config_changes, jsonable
from cc_jax.training.parameter_table import _count
from cc_jax.training.setup import (
  adapter_configs,
  base_options,
  check_config,
  heldout_prompt_sensitivity,
  make_batches,
  make_step_context,
  step_seed,
)
from cc_jax.training.step import TrainState, init_state, make_train_step
from cc_jax.training.telemetry import Profile, Telemetry


class Callbacks(NamedTuple):
  """What looks at the model while it trains, and after; None looks away. cc_jax.evaluate has both.

  Each gets (config, base, the model with averaged weights, the file or folder to write).
  """

  draw: Callable[[ml_collections.ConfigDict, Base, CustomContrast, epath.Path], None] | None
  finish: Callable[[ml_collections.ConfigDict, Base, CustomContrast, epath.Path], None] | None


NO_CALLBACKS = Callbacks(None, None)


def train(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  views: Callbacks = NO_CALLBACKS,
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
  check_config(config)
  workdir, settings = epath.Path(workdir), config.train
  set_cpu_devices(config.mesh, settings.batch_size)
  processes = initialize_distributed(config.mesh)
  checkpoints = Checkpoints(
    workdir / "checkpoints", keep=settings.keep, keep_every=settings.keep_every
  )
  mesh = make_mesh(config.mesh, settings.batch_size)
  leader = jax.process_index() == 0

  # The base and the adapter, read and made where they shall lie; from here on, plain pytrees.
  encoder, injection = adapter_configs(config)
  base = load_base(config.base, sharding=param_sharding_fn(mesh), **base_options(config))
  born = init_sharded(mesh)
  definition, trainable, frozen = build_customcontrast(
    base, encoder, injection, dtype=settings.dtype, seed=config.seed, transform=born
  )
  report = None
  if settings.warm_start and checkpoints.latest_step() is None:
    trainable, report = warm_start(gather_to_host(trainable), settings.warm_start)
    trainable = shard_params(trainable, mesh)
  method = make_step_context(config, definition, base)
  state = born(functools.partial(init_state, config=config))(trainable)
  check_sharding({"state": state, "frozen": frozen}, mesh)

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
  for text in (processes, f"mesh {dict(mesh.shape)}" if processes or shards_params(mesh) else ""):
    if text:
      log.say(text)
  if shards_params(mesh):
    parts = {"trained": state.trainable, "optimizer": state.opt_state, "average": state.ema}
    log.say(describe_sharding(parts | {"frozen": frozen}, mesh))
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
        f"{step}; {_checkpoint_left(checkpoints)}; lower train.learning_rate, look at the data (subjects and "
        f"norms are in {file}), or raise train.max_bad_steps to skip such steps"
      )

  profile = Profile(workdir / "profile", profile_steps)
  try:
    if start < settings.steps:
      with log.spent("starting"):
        batches = make_batches(config, base, config.seed, start, mesh)
        rows = next(batches)
        batch = shard_batch(rows, mesh)
        seed = shard_params(step_seed(config), mesh)
      with log.spent("compiling"):
        log.say("compiling the training step ...")
        for line in method.describe_contrast(mesh, trainable, frozen):
          log.say(line)
        began = time.perf_counter()
        step_fn = make_train_step(method, mesh, state, frozen)
        step_fn = step_fn.lower(state, frozen, batch, seed).compile()
        log.say(f"compiled in {time.perf_counter() - began:.0f} s")
        measure_utilisation(log, step_fn, mesh)
      with log.spent("starting"):
        measure_gaps = heldout_prompt_sensitivity(config, base, method, mesh) if settings.gaps_every else None

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
          batch = shard_batch(rows, mesh)
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
              run_callback(views.draw, config, base, model, workdir / "samples" / f"{step:07d}.png", log)
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

  adapter = gather_to_host(state.ema)
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
  run_callback(views.finish, config, base, model, workdir, log)
  return state


def run_callback(view: Callable | None, config, base, model: Callable, place: epath.Path, log) -> None:
  """Calls one of the Views. With several processes nobody has the whole model: see `evaluate`."""
  if view is None:
    return
  if jax.process_count() > 1:
    log.say(f"no pictures from several processes: python -m cc_jax.evaluate draws {place.name}")
    return
  view(config, base, model(), place)


def measure_utilisation(log: Telemetry, step: Any, mesh: jax.sharding.Mesh) -> None:
  """Tells the log what utilisation is measured by, where the chip's peak is known."""
  from cc_jax.plan import (
    chips,  # lazily: only accelerators need them
    hlo,
  )

  chip = chips.find(mesh.devices.flat[0].device_kind)
  if chip is not None:
    log.program(hlo.Program(step.as_text()).flops, chip.flops)


def due(step: int, *every: int) -> bool:
  """Whether `step` is a multiple of one of `every`; 0 stands for never."""
  return any(n and step % n == 0 for n in every)


def _checkpoint_left(checkpoints: Checkpoints) -> str:
  step = checkpoints.latest_step()
  return "no checkpoint yet" if step is None else f"the checkpoint of step {step} is intact"
