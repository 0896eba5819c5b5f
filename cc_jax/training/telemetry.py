"""The log of a run: metrics.jsonl, TensorBoard and a progress bar.

Beside losses and norms a line has `seconds` of a step, images per second, where the chip's peak is
known the utilisations `mfu` and `hfu` (model and hardware FLOPs: utilisation.py), and which
fractions (`share/`) of the time since the line before were spent on waiting for data, saving and
compiling.

A line averages the metrics since the line before, over the steps whose update was not skipped. Each
checkpoint holds the running sums, and a restart truncates the log to the step that it restores: the
log of a run that was killed and restarted has the same losses as that of one that was not.
"""

import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from cc_jax.errors import UserError, one_line

LAST_VALUE = ("learning_rate", "bad_steps")  # not averaged: a line has those of its own step
# These depend on the machine; everything else in a line is a function of config and step.
TIMINGS = ("seconds", "images_per_second", "images_per_second_per_chip", "mfu", "hfu")
SHARES = ("data", "saving", "compiling")


class Telemetry:
  """Writes one line per `every` steps; in a bucket, without TensorBoard."""

  def __init__(
    self, workdir: epath.Path, *, start: int, steps: int, every: int, batch_size: int,
    chips: int = 1, sums: Mapping[str, Any] | None = None, writes: bool = True,
  ):  # fmt: skip
    """Continues the log in `workdir` after step `start`; `sums` is a checkpoint's `state()`.

    `batch_size` is global. `writes` is False on all processes but one.
    """
    self._every, self._batch_size, self._writes = every, batch_size, writes
    self._chips, self._utilisation = chips, {}
    self._sums: dict[str, float] = dict(sums["sums"]) if sums else {}
    self._count: int = sums["count"] if sums else 0
    self._skipped: int = sums["skipped"] if sums else 0
    self._workdir = workdir
    self._restart_clock()
    if not writes:
      return
    self._path = workdir / "metrics.jsonl"
    truncate_log(self._path, start)
    self._file = self._tensorboard = None
    if "://" in str(workdir):  # nothing can be appended to a bucket's files
      self._text = self._path.read_text() if self._path.exists() else ""
    else:
      from tensorboardX import SummaryWriter  # lazily: a slow import that sampling never needs

      self._file = self._path.open("a")
      self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
    self._bar = tqdm.tqdm(
      initial=start, total=steps, unit="step", dynamic_ncols=True, mininterval=1.0, smoothing=0.05
    )

  def program(self, model_flops: float | None, compiled_flops: float, peak: float) -> None:
    """Sets the FLOPs of one step on one chip, needed and done; the chip's peak, FLOPs a second."""
    self._utilisation = {"hfu": compiled_flops / peak}
    if model_flops is not None:
      self._utilisation["mfu"] = model_flops / peak

  def waited(self, seconds: float) -> None:
    """Counts time that the loop waited for data; it is part of the step's time."""
    self._spent["data"] += seconds

  @contextlib.contextmanager
  def spent(self, on: str) -> Iterator[None]:
    """`with log.spent("saving"):` the time inside is no part of the step's."""
    began = time.perf_counter()
    try:
      yield
    finally:
      seconds = time.perf_counter() - began
      self._spent[on] += seconds
      self._outside += seconds
      if self._writes:
        self._bar.unpause()

  def step(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds one step's metrics (floats on the host); the first step is 1."""
    metrics = {key: float(value) for key, value in metrics.items()}
    skipped = metrics["bad_steps"] > 0
    self._count += 1
    self._timed += 1
    self._skipped += skipped
    if not skipped:
      for key, value in metrics.items():
        self._sums[key] = self._sums.get(key, 0.0) + value
    if self._writes:
      self._bar.update(1)
      self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}", refresh=False)
    if step % self._every == 0:
      line = {key: total / (self._count - self._skipped) for key, total in self._sums.items()}
      line["skipped"] = self._skipped / self._count
      line |= {key: metrics[key] for key in LAST_VALUE if key in metrics}
      self.write(step, line | self._times())
      self._sums, self._count, self._skipped = {}, 0, 0
      self._restart_clock()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line now. Raises UserError if the storage does not take it."""
    if not self._writes:
      return
    line = json.dumps({"step": step, **json_numbers(values)}) + "\n"
    with _storage_errors(self._path):
      if self._file is None:
        self._text += line
        self._path.write_text(self._text)
        return
      self._file.write(line)
      self._file.flush()
    for key, value in values.items():
      self._tensorboard.add_scalar(key, value, step)

  def dump(self, step: int, ids: Mapping[str, np.ndarray], metrics: Mapping[str, float]) -> str:
    """Writes the ids of this process's rows of a bad batch and the metrics; returns the file."""
    folder = self._workdir / "bad_steps"
    file = folder / f"{step:07d}.process{jax.process_index()}.json"
    record = {"step": step, "metrics": json_numbers({k: float(v) for k, v in metrics.items()})}
    record |= {key: np.asarray(value).tolist() for key, value in ids.items()}
    with _storage_errors(file):
      folder.mkdir(parents=True, exist_ok=True)
      file.write_text(json.dumps(record, indent=1) + "\n")
    return str(file)

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._writes:
      tqdm.tqdm.write(text)

  def state(self) -> dict[str, Any]:
    """The running sums, for a checkpoint's record; JSON keeps floats exactly."""
    return {"sums": dict(self._sums), "count": self._count, "skipped": self._skipped}

  def close(self) -> None:
    if self._writes:
      self._bar.close()
      if self._file is not None:
        self._tensorboard.close()
        with contextlib.suppress(OSError):  # a full disk, which `write` has told
          self._file.close()

  def _restart_clock(self) -> None:
    self._timed, self._outside, self._since = 0, 0.0, time.perf_counter()
    self._spent = collections.defaultdict(float)

  def _times(self) -> dict[str, float]:
    total = time.perf_counter() - self._since
    seconds = (total - self._outside) / self._timed
    rate = self._batch_size / seconds
    times = {"seconds": seconds, "images_per_second": rate}
    times["images_per_second_per_chip"] = rate / self._chips
    times |= {key: share / seconds for key, share in self._utilisation.items()}
    return times | {f"share/{kind}": self._spent[kind] / total for kind in SHARES}


@contextlib.contextmanager
def _storage_errors(path: epath.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f"cannot write {path}: {one_line(error)}; make room and run the same command again"
    ) from error


def json_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
  """NaN and infinity as text: JSON has none, and every program must be able to read a line."""
  return {k: v if math.isfinite(v) else str(v) for k, v in values.items()}


def truncate_log(path: epath.Path, step: int) -> None:
  """Drops the lines of a JSONL log after `step`, and a last line that a kill left incomplete."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(ValueError):
      if json.loads(line)["step"] <= step:
        kept.append(line)
  temporary = path.parent / f"{path.name}.tmp{os.getpid()}"
  temporary.write_text("".join(line + "\n" for line in kept))
  temporary.replace(path)


def read_log(path: epath.PathLike) -> list[dict[str, float]]:
  """The log's lines without timings: two equal runs agree on them."""
  lines = [json.loads(line) for line in epath.Path(path).read_text().splitlines()]
  timings = {*TIMINGS, *(f"share/{kind}" for kind in SHARES)}
  return [{k: v for k, v in line.items() if k not in timings} for line in lines]
