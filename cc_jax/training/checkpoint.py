"""Checkpoints of a training run. The only file that knows Orbax.

A checkpoint is the training state (adapter, optimizer, EMA, step, bad steps) as one flat dictionary
`path -> array`, and a small JSON record: the format's version, the hash of the adapter's base, the
config and the running sums of the log. Random numbers and the position in the data need no entries:
both are functions of the config's seed and the step. Nothing depends on how the arrays are sharded:
it is restored onto any mesh and any number of processes. The frozen base is never written.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath
from orbax.checkpoint import v1 as ocp

from cc_jax.cli import flatten_config, with_current_names
from cc_jax.errors import UserError
from cc_jax.models.params import flatten
from configs import subjects3d

FORMAT = 1
# A change of these changes the meaning of the adapter's weights, even if no shape changes.
MODEL_SECTIONS = ("encoder", "injection")
_UNREADABLE = "delete that folder to go on from the one before it"
ANSWER_TIMEOUT = 60  # seconds within which the storage must answer at the start
SAVE_TIMEOUT = 1200  # seconds within which a save must end
_ORBAX = os.path.join("orbax", "checkpoint")  # part of the path of its files


def _is_worth_telling(record: logging.LogRecord) -> bool:
  """A filter of log records: drops Orbax's own, except for its warnings; those of others pass.

  Orbax logs every step of a save, and every error with its traceback before it raises it, which
  the program tells in one line. Its logger, absl's, is also that of this package and of others.
  """
  # asyncio logs what a task of Orbax raised: there only the message names Orbax's file.
  source = record.getMessage() if record.name == "asyncio" else record.pathname
  return _ORBAX not in source or record.levelno == logging.WARNING


class Checkpoints:
  """The checkpoints of one folder or bucket: saves are asynchronous, the latest is restored.

  The last `keep` are kept, and those whose step is a multiple of `keep_every` (0 = none). A save
  that was interrupted leaves a temporary folder, which the next run removes. Of several processes
  each must call every method.
  """

  def __init__(self, folder: epath.PathLike, *, keep: int, keep_every: int = 0):
    """Opens or creates the folder. Raises UserError if it cannot be written in ANSWER_TIMEOUT s."""
    if keep < 1:
      raise UserError(f"train.keep is {keep}; keep at least one checkpoint")
    folder = os.fspath(folder)
    # Orbax takes no relative path.
    self._folder = epath.Path(folder if "://" in folder else os.path.abspath(folder))
    for name in ("absl", "asyncio"):
      logging.getLogger(name).addFilter(_is_worth_telling)  # a second time this changes nothing
    policies = ocp.training.preservation_policies
    policy = policies.LatestN(keep)
    if keep_every:
      policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(keep_every)])

    def probe_folder() -> None:
      self._folder.mkdir(parents=True, exist_ok=True)
      probe = self._folder / f".writable{jax.process_index()}"  # processes do this at once
      probe.write_text("")
      probe.unlink()

    try:
      within(ANSWER_TIMEOUT, probe_folder)
      context = ocp.Context()
      context.asynchronous.timeout_secs = SAVE_TIMEOUT
      self._orbax = ocp.training.Checkpointer(
        self._folder, context=context, preservation_policy=policy, cleanup_tmp_directories=True
      )
    except Exception as error:
      raise UserError(
        f"cannot write to {folder}: {reason(error)}; choose another --workdir"
      ) from error

  def latest_step(self) -> int | None:
    """The step of the latest complete checkpoint, or None."""
    latest = self._orbax.latest
    return None if latest is None else latest.step

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Starts a save; then buffers may be donated. UserError if this or the last save fails."""
    record = {"format": FORMAT, "step": step, **record}
    with self._explained(f"cannot save step {step}"):
      self._orbax.wait()
      self._orbax.save_async(step, flatten(state), force=True, custom_metadata=record)

  def wait(self) -> None:
    """Returns when every save is on disk. Raises UserError if one failed."""
    with self._explained("the last save failed"):
      self._orbax.wait()

  def close(self) -> None:
    """Waits for every save, then closes the folder. Raises UserError if one failed."""
    with self._explained("the last save failed"):
      self._orbax.close()

  def restore(
    self, state: Any, *, base_hash: str, config: ml_collections.ConfigDict
  ) -> tuple[Any, dict[str, Any]]:
    """The latest checkpoint in the structure, dtypes and placement of `state`, and its record.

    `state` may hold arrays or `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      UserError: the checkpoint is of another base, model or program, or is damaged.
    """
    step = self.latest_step()
    name = f"checkpoint {self._folder / str(step)}"
    with self._explained(f"cannot read {name}", _UNREADABLE):
      saved = self._orbax.metadata(step)
      if saved.metadata is None:
        raise ValueError("its list of arrays is damaged")
    record = saved.custom_metadata or {}
    if record.get("format") != FORMAT:
      raise UserError(
        f"{name} has format {record.get('format')} and this program reads {FORMAT}; "
        "choose another --workdir"
      )
    if record["base_hash"] != base_hash:
      raise UserError(
        f"{name} belongs to the base {record['config']['base']} (hash {record['base_hash'][:12]})"
        f" but {config.base} has hash {base_hash[:12]}; use that base or choose another --workdir"
      )
    for key, (before, now) in config_changes(record["config"], config).items():
      if key.split(".")[0] in MODEL_SECTIONS:
        raise UserError(
          f"{name} was trained with {key}={before!r} and the config now says {now!r}, which is "
          "another model; undo the change or choose another --workdir"
        )
    target = flatten(state)
    _check_arrays(saved.metadata, target, name)
    abstract = {
      key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for key, x in target.items()
    }
    with self._explained(f"cannot read {name}", _UNREADABLE):
      loaded = self._orbax.load(step, abstract)
    return jax.tree.unflatten(jax.tree.structure(state), [loaded[key] for key in target]), record

  @contextlib.contextmanager
  def _explained(self, what: str, remedy: str = "") -> Iterator[None]:
    """Turns errors of Orbax and the file system into one line with what is still intact."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      last = self.latest_step()
      kept = "there is no earlier checkpoint" if last is None else f"step {last} is intact"
      remedy = remedy or f"{kept}; make room and run the same command again"
      raise UserError(f"{what}: {reason(error)}; {remedy}") from error


def within(seconds: float, function: Callable[[], Any]) -> Any:
  """function(), or TimeoutError. Its thread goes on: storage that hangs cannot be interrupted."""
  outcome: dict[str, Any] = {}

  def run() -> None:
    try:
      outcome["value"] = function()
    except BaseException as error:  # noqa: BLE001 (it is raised below)
      outcome["error"] = error

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  if "error" in outcome:
    raise outcome["error"]
  if "value" not in outcome:
    raise TimeoutError(f"no answer within {seconds:g} s")
  return outcome["value"]


def config_changes(
  saved: Mapping[str, Any], config: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
  """Dotted keys whose values differ -> (saved, now), with None for a key that is absent.

  A key that was added since and has its default is no change.
  """
  before, now = with_current_names(flatten_config(saved)), flatten_config(jsonable(config))
  defaults = flatten_config(jsonable(subjects3d.get_config()))
  before = {key: value for key, value in defaults.items() if key in now} | before
  keys = sorted(before.keys() | now.keys())
  return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}


def jsonable(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as JSON returns it: tuples are lists."""
  return json.loads(json.dumps(config.to_dict()))


def reason(error: BaseException) -> str:
  """The first line of the innermost cause, which is the one that a user can mend."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


def _check_arrays(saved: Mapping[str, Any], target: Mapping[str, Any], name: str) -> None:
  """Raises UserError naming the first keys that differ between a checkpoint and the model."""

  def show(keys) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

  missing, unknown = target.keys() - saved.keys(), saved.keys() - target.keys()
  other = [
    f"{key} {saved[key].dtype}{list(saved[key].shape)} instead of {x.dtype}{list(x.shape)}"
    for key, x in target.items()
    if key in saved and (tuple(saved[key].shape), saved[key].dtype) != (tuple(x.shape), x.dtype)
  ]
  parts = [f"it lacks {show(missing)}"] if missing else []
  parts += [f"it has {show(unknown)}, unknown here"] if unknown else []
  parts += [f"it holds {show(other)}"] if other else []
  if parts:
    raise UserError(f"{name} is of another model: {'; '.join(parts)}; choose another --workdir")
