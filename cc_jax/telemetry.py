"""What a run tells: metrics.jsonl, TensorBoard and a progress bar.

Metrics are averaged between two log lines, over the steps whose update was not skipped. The running
sums travel with every checkpoint and a restart cuts the log back to the step it restores, so that
the log of a run that was killed and restarted holds the very losses of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm
from etils import epath

# Averages mean nothing for these: the value of the line's own step is what one wants to see.
LAST_VALUE = ("learning_rate", "bad_steps")
# Depend on the machine's day; everything else in a line is a function of config and step.
TIMINGS = ("seconds", "images_per_second", "data_wait")


class Telemetry:
  """Writes one line per `every` steps. `batch_size` is the global one."""

  def __init__(
    self,
    workdir: epath.Path,
    *,
    start: int,
    steps: int,
    every: int,
    batch_size: int,
    sums: Mapping[str, Any] | None = None,
    writes: bool = True,
  ):
    """Continues the log in `workdir` after step `start`; `sums` is an earlier `state()`.

    `writes` is False on all processes but one.
    """
    self._every, self._batch_size, self._writes = every, batch_size, writes
    self._sums: dict[str, float] = dict(sums["sums"]) if sums else {}
    self._count: int = sums["count"] if sums else 0
    self._skipped: int = sums["skipped"] if sums else 0
    self._waited, self._timed, self._since = 0.0, 0, time.perf_counter()
    if not writes:
      return
    from tensorboardX import SummaryWriter  # lazily: a slow import that sampling never needs

    self._path = workdir / "metrics.jsonl"
    cut_back(self._path, start)
    self._file = self._path.open("a")
    self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
    self._bar = tqdm.tqdm(
      initial=start, total=steps, unit="step", dynamic_ncols=True, mininterval=1.0, smoothing=0.05
    )

  def waited(self, seconds: float) -> None:
    """Counts time in which the loop had to wait for data."""
    self._waited += seconds

  def step(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes one step's metrics (floats on the host), `step` counting finished steps from 1."""
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
      seconds = time.perf_counter() - self._since
      line["seconds"] = seconds / self._timed
      line["images_per_second"] = self._batch_size * self._timed / seconds
      line["data_wait"] = self._waited / seconds
      self.write(step, line)
      self._sums, self._count, self._skipped = {}, 0, 0
      self._waited, self._timed, self._since = 0.0, 0, time.perf_counter()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line of any values now: averages, wrong-word gaps, scores."""
    if not self._writes:
      return
    # JSON has no NaN: a line with one must still be readable by every program.
    plain = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
    self._file.write(json.dumps({"step": step, **plain}) + "\n")
    self._file.flush()
    for key, value in values.items():
      self._tensorboard.add_scalar(key, value, step)

  def restart_clock(self) -> None:
    """Rates count from now on: what came before (compiling) is no part of a step."""
    self._since = time.perf_counter()
    if self._writes:
      self._bar.unpause()

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    if self._writes:
      tqdm.tqdm.write(text)

  def state(self) -> dict[str, Any]:
    """The running sums, for a checkpoint's record; JSON keeps floats exactly."""
    return {"sums": dict(self._sums), "count": self._count, "skipped": self._skipped}

  def pause(self) -> _Pause:
    """`with telemetry.pause():` leaves what happens inside out of images/s (sampling, saving)."""
    return _Pause(self)

  def close(self) -> None:
    if self._writes:
      self._bar.close()
      self._tensorboard.close()
      self._file.close()


class _Pause:
  def __init__(self, telemetry: Telemetry):
    self._telemetry = telemetry

  def __enter__(self) -> None:
    self._start = time.perf_counter()

  def __exit__(self, *_) -> None:
    self._telemetry._since += time.perf_counter() - self._start


def cut_back(path: epath.Path, step: int) -> None:
  """Drops the lines of a JSONL log after `step`, and a last line that was cut off by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except ValueError:
      pass
  beside = path.parent / f"{path.name}.tmp{os.getpid()}"
  beside.write_text("".join(line + "\n" for line in kept))
  beside.replace(path)


def read(path: epath.PathLike) -> list[dict[str, float]]:
  """The log's lines, timings left out: what two equal runs must agree on."""
  lines = [json.loads(line) for line in epath.Path(path).read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def align(rows: Sequence[Sequence[str]], left: int) -> str:
  """A table in plain text; the first `left` columns are flush left, numbers flush right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
