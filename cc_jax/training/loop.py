"""The training loop. Read from the top down: set up, restore or initialise, loop, finish."""

import contextlib
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

import data_pipeline
from cc_jax.bases.base import Base, load_base
from cc_jax.customcontrast import ip_adapter
from cc_jax.customcontrast.build import build_customcontrast
from cc_jax.errors import UserError
from cc_jax.models.params import Params
from cc_jax.parallel.attention import mesh_kernels
from cc_jax.parallel.distributed import initialize_distributed, set_cpu_devices
from cc_jax.parallel.mesh import gather_to_host, make_mesh, shard_batch
from cc_jax.parallel.rules import init_sharded, param_sharding_fn, shard_params, shards_params
from cc_jax.parallel.sharding_report import check_sharding, describe_sharding
from cc_jax.training import setup
from cc_jax.training.cached_features import move_to_host, without_encoders
from cc_jax.training.checkpoint import Checkpoints, config_changes
from cc_jax.training.preemption import EXIT_CODE, Preemption
from cc_jax.training.run import (
  NO_CALLBACKS,
  Callbacks,
  FinishedStep,
  Run,
  log_latest,
  log_step,
  run_callback,
  save,
  save_after_error,
  write_adapter,
)
from cc_jax.training.step import TrainState, init_state, make_train_step
from cc_jax.training.step_parts import Profile, make_profile
from cc_jax.training.telemetry import Telemetry
from cc_jax.training.utilisation import measure_utilisation, read_program
from cc_jax.training.workdir_lock import lock_workdir
from data_pipeline.errors import DataError


def train(
  config: ml_collections.ConfigDict, workdir: epath.PathLike, callbacks: Callbacks = NO_CALLBACKS,
  profile_steps: tuple[int, int] = (0, 0),
) -> TrainState:
  """Trains until config.train.steps, from the latest checkpoint in `workdir` if there is one.

  An error behind the first step leaves the state saved, as a checkpoint and as an adapter.

  Args:
    workdir: a folder or a bucket's URL, the same for all processes.
    profile_steps: the first and last step of a trace in workdir/profile; (0, 0) = none.

  Raises:
    UserError: a mistake in the config, the base or the checkpoint; a workdir that cannot be
      written; max_bad_steps losses in a row that are not finite; processes that did not join.
    DataError: a mistake in the data.
    SystemExit: 143 after SIGTERM, when the state is saved.
  """
  with contextlib.ExitStack() as lock:
    return run_training(set_up(config, epath.Path(workdir), lock), callbacks, profile_steps)


def run_training(run: Run, callbacks: Callbacks, profile_steps: tuple[int, int]) -> TrainState:
  """From set up to the last picture; whatever ends it, the good state is saved."""
  config, profile = run.config, make_profile(run.log, run.workdir, profile_steps, run.start)
  try:
    if callbacks.on_start is not None and jax.process_count() == 1:
      if line := callbacks.on_start(config, run.base):
        run.log.say(line)
    if run.start < config.train.steps:
      run_steps(run, callbacks, profile)
    else:
      write_adapter(run, run.start)
    run.checkpoints.wait()
  except (Exception, KeyboardInterrupt) as error:
    saved = save_after_error(run, error)
    if saved and isinstance(error, UserError | DataError):
      raise type(error)(f"{error}; {saved}") from error
    if saved:
      run.log.say(saved)
    raise
  finally:
    profile.close()
    run.log.close()
    with contextlib.suppress(UserError):  # a save that failed is told above
      run.checkpoints.close()
  run_callback(run, callbacks.on_finish, run.workdir)
  return run.state


def set_up(
  config: ml_collections.ConfigDict, workdir: epath.Path, lock: contextlib.ExitStack
) -> Run:
  """Everything before the first step; says what is trained, and where. `lock` holds the workdir."""
  setup.check_config(config)
  data_pipeline.check_folder(config.data)  # before a base of gigabytes is fetched
  data_pipeline.check_cached(config.data)
  settings = config.train
  set_cpu_devices(config.mesh, settings.batch_size)
  processes = initialize_distributed(config.mesh)
  check_lock = lambda: None  # noqa: E731
  if jax.process_index() == 0:
    check_lock = lock.enter_context(lock_workdir(workdir))
  folder = workdir / "checkpoints"
  checkpoints = Checkpoints(folder, keep=settings.keep, keep_every=settings.keep_every)
  mesh = make_mesh(config.mesh, settings.batch_size)
  attention = mesh_kernels(settings.attention, mesh, dtype=settings.dtype, training=True)
  # The base is read, and the adapter initialised, where it is sharded to; both are plain pytrees.
  adapter = setup.adapter_configs(config)
  base = load_base(config.base, sharding=param_sharding_fn(mesh), **setup.base_options(config))
  definition, trainable, frozen = build_customcontrast(
    base, *adapter, dtype=settings.dtype, seed=config.seed, transform=init_sharded(mesh)
  )
  context, encoders = setup.make_step_context(config, definition, base), {}
  if config.data.cached:
    context, frozen, encoders = without_encoders(context, frozen)
    encoders, base = move_to_host(encoders, base)
  state, record, warm_start = restore_or_initialise(config, checkpoints, base, trainable, mesh)
  check_sharding({"state": state, "frozen": frozen}, mesh)
  log = Telemetry(
    workdir, start=record["step"], sums=record["telemetry"], steps=settings.steps,
    every=settings.log_every, batch_size=settings.batch_size, chips=mesh.size,
    writes=jax.process_index() == 0,
  )  # fmt: skip
  run = Run(config, workdir, mesh, base, context, frozen, state, record["step"], checkpoints, log,
            check_lock, encoders)
  log_set_up(run, processes, warm_start)
  log.say(attention.describe())
  return run


def restore_or_initialise(
  config: ml_collections.ConfigDict, checkpoints: Checkpoints, base: Base, new: Params, mesh: Mesh
) -> tuple[TrainState, Mapping[str, Any], ip_adapter.Report | None]:
  """(state, record of its checkpoint, report of a warm start).

  Without a checkpoint the state has the weights `new`, or those of train.warm_start.
  """
  restores, report = checkpoints.latest_step() is not None, None
  if config.train.warm_start and not restores:
    new, report = ip_adapter.warm_start(gather_to_host(new), config.train.warm_start)
    new = shard_params(new, mesh)
  state = init_sharded(mesh)(functools.partial(init_state, config=config))(new)
  if not restores:
    return state, {"step": 0, "telemetry": None}, report
  state, record = checkpoints.restore(state, base_hash=base.hash, config=config)
  if jax.process_index() == 0:
    for key, (before, now) in config_changes(record["config"], config).items():
      print(f"config change since step {record['step']}: {key} was {before!r}, is {now!r}")
  return state, record, None


def log_set_up(run: Run, processes: str, warm_start: ip_adapter.Report | None) -> None:
  """Says which processes and devices there are, what they hold, and what a warm start used."""
  mesh, state, say = run.mesh, run.state, run.log.say
  if processes:
    say(processes)
  if processes or shards_params(mesh):
    say(f"mesh {dict(mesh.shape)}")
  if shards_params(mesh):
    parts = {"trained": state.trainable, "optimizer": state.opt_state, "EMA": state.ema}
    say(describe_sharding(parts | {"frozen": run.frozen}, mesh))
  trained, frozen = (sum(x.size for x in part.values()) for part in (state.trainable, run.frozen))
  say(f"{trained:,} trained, {frozen:,} frozen parameters; {mesh.size} devices")
  if run.config.data.cached:
    say("features are read and not computed: no VAE and no image encoder on the devices")
  if warm_start:
    say(warm_start.summary())
    if jax.process_index() == 0:
      (run.workdir / "warm_start.txt").write_text(str(warm_start))


def run_steps(run: Run, callbacks: Callbacks, profile: Profile) -> None:
  """The steps from `run.start` on, each with what is due after it.

  While a step runs, the metrics of the one before are logged and the next batch is transferred.
  After it the order is: log, save, evaluate. So a run that dies of drawing has saved the step, and
  goes on behind it when it is started again: that step is not evaluated once more. A restart
  truncates the log to the checkpoint's step, and keeps the lines of that step's evaluation.
  """
  config, settings, mesh, log = run.config, run.config.train, run.mesh, run.log
  with log.spent("starting"):
    batches = setup.make_batches(config, run.base, config.seed, run.start, mesh)
    rows = next(batches)
    batch, seed = shard_batch(rows, mesh), shard_params(setup.step_seed(config), mesh)
  step_fn = compile_step(run, batch, seed, profile)
  with log.spent("starting"):
    sensitivity_fn = settings.prompt_sensitivity_every and setup.heldout_prompt_sensitivity(
      config, run.base, run.context, mesh
    )

  with Preemption() as preemption:
    for step in range(run.start + 1, settings.steps + 1):
      profile.before(step)
      with jax.transfer_guard("disallow"):  # what the step needs is on the devices
        run.state, metrics = step_fn(run.state, run.frozen, batch, seed)
      profile.after(step, metrics)
      ids = {key: values for key, values in rows.items() if key.endswith("_id")}
      before, run.unlogged = run.unlogged, FinishedStep(step, metrics, ids)
      if before is not None:
        log_step(run, before)
      if step < settings.steps:
        began = time.perf_counter()
        rows = next(batches)
        batch = shard_batch(rows, mesh)
        if metrics["loss"].is_ready():  # the devices were idle while we waited for data
          log.waited(time.perf_counter() - began)

      stops = preemption.stops_after(step)
      if stops or due(step, settings.save_every, settings.steps):
        save(run, step)
      if stops:
        run.checkpoints.wait()  # the machine may be gone before the step is evaluated
      if due(step, settings.prompt_sensitivity_every, settings.sample_every):
        log_latest(run)
        with log.spent("evaluating"):
          if due(step, settings.prompt_sensitivity_every):
            if gaps := sensitivity_fn(run.state.ema, run.frozen):
              log.write(step, gaps)
          if due(step, settings.sample_every):
            run_callback(run, callbacks.on_sample, run.workdir / "samples" / f"{step:07d}.png")
      if stops:
        log.say(f"SIGTERM: step {step} is saved; the same command goes on from there")
        raise SystemExit(EXIT_CODE)


def compile_step(
  run: Run, batch: Mapping[str, jax.Array], seed: jax.Array, profile: Profile
) -> jax.stages.Compiled:
  """The training step, compiled before the first one so that its time can be told apart."""
  with run.log.spent("compiling"):
    run.log.say("compiling the training step ...")
    for line in run.context.describe_contrast(run.mesh, run.state.trainable, run.frozen):
      run.log.say(line)
    began = time.perf_counter()
    step_fn = make_train_step(run.context, run.mesh, run.state, run.frozen)
    arguments = (run.state, run.frozen, batch, seed)
    step_fn = step_fn.lower(*arguments).compile()
    run.log.say(f"compiled in {time.perf_counter() - began:.0f} s")
    program = measure_utilisation(run.log, run.context, run.mesh, step_fn, arguments)
    profile.program = lambda: program or read_program(step_fn)
  return step_fn


def due(step: int, *every: int) -> bool:
  """Whether `step` is a multiple of one of `every`; 0 stands for never."""
  return any(n and step % n == 0 for n in every)
