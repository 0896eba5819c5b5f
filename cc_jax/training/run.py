"""A training run and what it leaves behind: log, checkpoints, adapter, pictures."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cc_jax.bases.base import Base
from cc_jax.customcontrast.adapter_base import describe_base
from cc_jax.customcontrast.adapter_file import save_adapter
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.errors import UserError
from cc_jax.models.params import Params
from cc_jax.parallel.mesh import gather_to_host
from cc_jax.training import setup
from cc_jax.training.checkpoint import Checkpoints, jsonable, reason
from cc_jax.training.step import TrainState
from cc_jax.training.step_context import StepContext
from cc_jax.training.telemetry import Telemetry

Callback = Callable[[ml_collections.ConfigDict, Base, CustomContrast, epath.Path], None]


class Callbacks(NamedTuple):
  """What draws, in a run of one process. cc_jax.evaluate has all three.

  The last two get (config, base, model with EMA weights, where to write).

  on_start: before the first step, with (config, base): finds what the others would stumble over,
    and returns a line to say, or "".
  on_sample: every config.train.sample_every steps, with the file of a picture.
  on_finish: once the training has ended, with the workdir.
  """

  on_sample: Callback | None = None
  on_finish: Callback | None = None
  on_start: Callable[[ml_collections.ConfigDict, Base], str] | None = None


NO_CALLBACKS = Callbacks()


class LossNotFiniteError(UserError):
  """train.max_bad_steps losses or gradients in a row were not finite."""


class FinishedStep(NamedTuple):
  """A step whose metrics may still be computed."""

  step: int
  metrics: Any
  ids: Mapping[str, np.ndarray]  # of subjects, families and classes in its batch


@dataclasses.dataclass
class Run:
  """A run of training and its devices. A step donates `state`: nothing else may refer to it."""

  config: ml_collections.ConfigDict
  workdir: epath.Path
  mesh: Mesh
  base: Base
  context: StepContext
  frozen: Params
  state: TrainState
  start: int  # finished steps at the beginning of this process
  checkpoints: Checkpoints
  log: Telemetry
  check_lock: Callable[[], None]  # UserError if another run took the workdir: lock_workdir
  encoders: Params = dataclasses.field(default_factory=dict)  # on the host, if data.cached
  unlogged: FinishedStep | None = None  # the latest step, until it is logged
  last_update: int = 0  # the latest logged step that changed the weights


def log_latest(run: Run) -> None:
  """`log_step` of the latest step, unless it is logged already."""
  latest, run.unlogged = run.unlogged, None
  if latest is not None:
    log_step(run, latest)


def log_step(run: Run, finished: FinishedStep) -> None:
  """Fetches the metrics of a step, which waits for it. LossNotFiniteError: the run goes wrong."""
  step, metrics, ids = finished
  metrics = jax.device_get(metrics)
  run.log.step(step, metrics)
  bad_steps = int(metrics["bad_steps"])
  if not bad_steps:
    run.last_update = step
    return
  file, limit = run.log.dump(step, ids, metrics), run.config.train.max_bad_steps
  if bad_steps >= limit:
    raise LossNotFiniteError(
      f"loss or gradient is not finite, {bad_steps} steps in a row up to step {step}; lower "
      f"train.learning_rate, look at the data (subjects and norms are in {file}), or raise "
      "train.max_bad_steps to skip more such steps"
    )
  if bad_steps == 1:
    run.log.say(f"step {step} is skipped, its loss or gradient is not finite: see {file}")


def save(run: Run, step: int) -> None:
  """Starts the checkpoint of `step`, the latest one, and writes the adapter.

  The step is logged before: a checkpoint holds the running sums of the log. All processes must call
  it. Raises UserError if the storage does not take it.
  """
  log_latest(run)
  run.check_lock()
  with run.log.spent("saving"):
    record = {"base_hash": run.base.hash, "config": jsonable(run.config)}
    run.checkpoints.save(step, run.state, record | {"telemetry": run.log.state()})
    write_adapter(run, step)


def save_after_error(run: Run, error: BaseException) -> str:
  """Saves what was learned since the latest checkpoint; says what is saved, "" if nothing is.

  Steps that are not finite change no weights, so the state is good after them too. If only such
  steps came after the latest checkpoint, that one stays the latest.
  """
  # Of several processes the others go on, unless all have seen the same loss.
  alone = jax.process_count() > 1 and not isinstance(error, LossNotFiniteError)
  failure = ""
  try:
    if not alone:
      with contextlib.suppress(UserError):  # of an earlier save
        run.checkpoints.wait()
    saved = run.checkpoints.latest_step() or 0
    if max(run.last_update, run.unlogged.step if run.unlogged else 0) > saved:
      if alone:
        raise UserError("of several processes one cannot save alone")
      # A step that failed has taken its state along, at once or when its result is waited for.
      if any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state)):
        raise UserError("the step that failed has used up the state")
      jax.block_until_ready(run.state)
      with contextlib.suppress(LossNotFiniteError):
        log_latest(run)
      if run.last_update > saved:
        save(run, int(run.state.step))
        run.checkpoints.wait()
  except Exception as second:
    failure = f"the latest steps could not be saved ({reason(second)}); "
  latest = run.checkpoints.latest_step()
  if latest is None:
    return failure and f"{failure}there is no checkpoint yet"
  return f"{failure}step {latest} is saved, and the same command goes on from there"


def run_callback(run: Run, callback: Callback | None, path: epath.Path) -> None:
  """Calls it, if there is one process: of several, none has all of the model (see `evaluate`)."""
  if callback is None:
    return
  if jax.process_count() > 1:
    run.log.say(f"no pictures from several processes: python -m cc_jax.evaluate draws {path.name}")
    return
  model = run.context.model(run.state.ema, run.frozen, run.encoders)
  callback(run.config, run.base, model, path)


def write_adapter(run: Run, step: int) -> None:
  """Writes the EMA weights to workdir/adapter.safetensors; all processes must call it.

  A step whose checkpoint is kept for good (train.keep_every) has a file of its own besides.
  """
  tensors, config = gather_to_host(run.state.ema), run.config
  if jax.process_index() != 0:
    return
  encoder, injection = setup.adapter_configs(config)
  notes = {
    "steps": str(step),
    "data": f"{config.data.source} {config.data.name}",
    # How references are displayed: sampling does the same.
    "reference_share": str(config.data.reference_ratio),
    "reference_place": config.data.reference_layout,
  }
  names = ["adapter.safetensors"]
  if config.train.keep_every and step % config.train.keep_every == 0:
    names.append(f"adapter-{step:07d}.safetensors")
  for name in names:
    save_adapter(
      run.workdir / name, tensors, encoder=encoder, injection=injection, notes=notes,
      **describe_base(run.base),
    )  # fmt: skip
