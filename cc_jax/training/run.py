"""A training run and what it leaves behind: log, checkpoints, adapter, pictures."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cc_jax.bases.base import Base
from cc_jax.customcontrast.adapter_file import save_adapter
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.errors import UserError
from cc_jax.models.params import Params
from cc_jax.parallel.mesh import gather_to_host
from cc_jax.training import setup
from cc_jax.training.checkpoint import Checkpoints
from cc_jax.training.step import TrainState
from cc_jax.training.step_context import StepContext
from cc_jax.training.telemetry import Telemetry

Callback = Callable[[ml_collections.ConfigDict, Base, CustomContrast, epath.Path], None]


class Callbacks(NamedTuple):
  """Each gets (config, base, model with EMA weights, where to write). cc_jax.evaluate has both.

  on_sample: every config.train.sample_every steps, with the file of a picture.
  on_finish: once the adapter is written, with the workdir.
  """

  on_sample: Callback | None = None
  on_finish: Callback | None = None


NO_CALLBACKS = Callbacks()


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


def log_step(run: Run, step: int, metrics: Any, ids: Mapping[str, np.ndarray]) -> None:
  """Fetches the metrics of a step, which waits for it; stops a run that went wrong (UserError)."""
  metrics = jax.device_get(metrics)
  run.log.step(step, metrics)
  if not metrics["bad_steps"]:
    return
  file = run.log.dump(step, ids, metrics)
  if metrics["bad_steps"] >= run.config.train.max_bad_steps:
    latest = run.checkpoints.latest_step()
    kept = "no checkpoint yet" if latest is None else f"the checkpoint of step {latest} is intact"
    raise UserError(
      f"loss or gradient is not finite, {int(metrics['bad_steps'])} steps in a row up to step "
      f"{step}; {kept}; lower train.learning_rate, look at the data (subjects and norms are in "
      f"{file}), or raise train.max_bad_steps to skip such steps"
    )


def run_callback(run: Run, callback: Callback | None, path: epath.Path) -> None:
  """Calls it, if there is one process: of several, none has all of the model (see `evaluate`)."""
  if callback is None:
    return
  if jax.process_count() > 1:
    run.log.say(f"no pictures from several processes: python -m cc_jax.evaluate draws {path.name}")
    return
  callback(run.config, run.base, run.context.model(run.state.ema, run.frozen), path)


def save_final_adapter(run: Run) -> None:
  """Writes the EMA weights to workdir/adapter.safetensors; all processes must call it."""
  tensors, config = gather_to_host(run.state.ema), run.config
  if jax.process_index() != 0:
    return
  encoder, injection = setup.adapter_configs(config)
  notes = {
    "steps": str(int(run.state.step)),
    "data": f"{config.data.source} {config.data.name}",
    # How references are displayed: sampling does the same.
    "reference_share": str(config.data.reference_ratio),
    "reference_place": config.data.reference_layout,
  }
  save_adapter(
    run.workdir / "adapter.safetensors", tensors, encoder=encoder, injection=injection,
    base_name=run.base.name, base_hash=run.base.hash, notes=notes,
  )  # fmt: skip
