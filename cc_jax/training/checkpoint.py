"""Checkpoints of a training run. The only file that knows Orbax.

A checkpoint holds the training state (adapter, optimizer, EMA, step, bad steps) as one flat
dictionary `path -> array`, and beside it a small JSON record: the format's version, the hash of
the base that the adapter belongs to, the run's config and the telemetry's running sums. Random
numbers and the data position need no entries of their own: both are pure functions of the config's
seed and the state's step. Nothing in it depends on how the arrays are cut: it is restored onto any
mesh and any number of processes. The frozen base is never written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath
from orbax.checkpoint import v1 as ocp

from cc_jax.errors import UserError
from cc_jax.models.params import flatten

FORMAT = 1
# A change of these changes what the adapter's weights mean, even where no shape changes.
MODEL_SECTIONS = ("encoder", "injection")
_UNREADABLE = "delete that folder to go on from the one before it"
# Seconds. A storage that does not answer at the start is waited for as long as this; a save, whose
# bytes may be many, as long as that.
ANSWER_TIMEOUT = 60
SAVE_TIMEOUT = 1200


class Checkpoints:
  """The checkpoints of one folder or bucket: asynchronous saves, the latest restored.

  The last `keep` are kept, and besides those whose step is a multiple of `keep_every` (0 = none).
  A save that was cut off leaves a temporary folder, which the next run removes. Where there are
  several processes, each calls every method.
  """

  def __init__(self, folder: epath.PathLike, *, keep: int, keep_every: int = 0):
    """Opens the folder, which is made if need be.

    Raises:
      UserError: it cannot be written, or does not answer within ANSWER_TIMEOUT seconds.
    """
    if keep < 1:
      raise UserError(f"train.keep is {keep}; keep at least one checkpoint")
    folder = os.fspath(folder)
    # Orbax takes no relative path; a bucket's URL has none.
    self._folder = epath.Path(folder if "://" in folder else os.path.abspath(folder))
    # Orbax logs every step of a save, and every error with its traceback before it raises it.
    for name in ("absl", "asyncio"):
      logging.getLogger(name).setLevel(logging.CRITICAL)
    policies = ocp.training.preservation_policies
    policy = policies.LatestN(keep)
    if keep_every:
      policy = policies.AnyPreservationPolicy([policy, policies.EveryNSteps(keep_every)])

    def look() -> None:
      self._folder.mkdir(parents=True, exist_ok=True)
      # Several processes may look at once.
      probe = self._folder / f".writable{jax.process_index()}"
      probe.write_text("")
      probe.unlink()

    try:
      _within(ANSWER_TIMEOUT, look)
      self._orbax = ocp.training.Checkpointer(
        self._folder,
        context=ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_TIMEOUT)),
        preservation_policy=policy,
        cleanup_tmp_directories=True,
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
    """Starts to write `state` in the background; returns once its buffers may be donated.

    Raises:
      UserError: this save could not start, or the one before it failed.
    """
    record = {"format": FORMAT, "step": step, **record}
    with self._explained(f"cannot save step {step}"):
      self._orbax.wait()
      self._orbax.save_async(step, flatten(state), force=True, custom_metadata=record)

  def wait(self) -> None:
    """Returns when every save is on disk. Raises UserError if one failed."""
    with self._explained("the last save failed"):
      self._orbax.wait()

  def close(self) -> None:
    """Waits, then lets go of the folder. Raises UserError if a save failed."""
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
    place = f"checkpoint {self._folder / str(step)}"
    with self._explained(f"cannot read {place}", _UNREADABLE):
      saved = self._orbax.metadata(step)
      if saved.metadata is None:
        raise ValueError("its list of arrays is damaged")
    record = saved.custom_metadata or {}
    if record.get("format") != FORMAT:
      raise UserError(
        f"{place} has format {record.get('format')} and this program reads {FORMAT}; "
        "choose another --workdir"
      )
    if record["base_hash"] != base_hash:
      raise UserError(
        f"{place} belongs to the base {record['config']['base']} (hash {record['base_hash'][:12]})"
        f" but {config.base} has hash {base_hash[:12]}; use that base or choose another --workdir"
      )
    for key, (before, now) in config_changes(record["config"], config).items():
      if key.split(".")[0] in MODEL_SECTIONS:
        raise UserError(
          f"{place} was trained with {key}={before!r} and the config now says {now!r}, which is "
          "another model; undo the change or choose another --workdir"
        )
    wanted = flatten(state)
    _compare(saved.metadata, wanted, place)
    abstract = {
      key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for key, x in wanted.items()
    }
    with self._explained(f"cannot read {place}", _UNREADABLE):
      loaded = self._orbax.load(step, abstract)
    return jax.tree.unflatten(jax.tree.structure(state), [loaded[key] for key in wanted]), record

  @contextlib.contextmanager
  def _explained(self, what: str, remedy: str = "") -> Iterator[None]:
    """Turns errors of Orbax and the file system into one line that says what is still intact."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      last = self.latest_step()
      kept = "there is no earlier checkpoint" if last is None else f"step {last} is intact"
      remedy = remedy or f"{kept}; make room and run the same command again"
      raise UserError(f"{what}: {reason(error)}; {remedy}") from error


def _within(seconds: float, function: Callable[[], Any]) -> Any:
  """function(), or TimeoutError. A storage that hangs cannot be interrupted: its thread is left."""
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
  """Dotted keys whose value differs -> (saved, now), None standing for a key that is not there."""
  before, now = _dotted(saved), _dotted(jsonable(config))
  keys = sorted(before.keys() | now.keys())
  return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}


def jsonable(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as JSON gives it back: tuples are lists."""

  def plain(value):
    if isinstance(value, Mapping):
      return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

  return plain(config.to_dict())


def reason(error: BaseException) -> str:
  """The first line of the innermost cause, which is the one that a person can mend."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  out = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      out |= _dotted(value, f"{prefix}{key}.")
    else:
      out[prefix + key] = value
  return out


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], place: str) -> None:
  """Raises UserError naming the first keys that differ between a checkpoint and the model."""

  def show(keys) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")

  missing, unknown = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
  other = [
    f"{key} {saved[key].dtype}{list(saved[key].shape)} instead of {x.dtype}{list(x.shape)}"
    for key, x in wanted.items()
    if key in saved and (tuple(saved[key].shape), saved[key].dtype) != (tuple(x.shape), x.dtype)
  ]
  parts = [f"it lacks {show(missing)}"] if missing else []
  parts += [f"it has {show(unknown)}, unknown here"] if unknown else []
  parts += [f"it holds {show(other)}"] if other else []
  if parts:
    raise UserError(f"{place} is of another model: {'; '.join(parts)}; choose another --workdir")
