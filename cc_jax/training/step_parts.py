"""The largest parts of a step, from a trace of a few: what to make faster first."""

import collections
import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath

from cc_jax.errors import one_line
from cc_jax.training.telemetry import Telemetry

SKIPPED, TRACED = 2, 2  # steps before the trace that nobody asked for, and in it
# Files of networks; the model that holds them all is none.
_NETWORK = re.compile(r"/cc_jax/(models|customcontrast)/(?!model\.py)")


class Profile:
  """A trace of steps first to last, inclusive, and a log line of what took longest in it.

  No run fails because of its trace: a failure is a warning.
  """

  def __init__(self, log: Telemetry, folder: epath.Path | None, steps: tuple[int, int] = (0, 0)):
    """`folder` keeps the trace; None: it is thrown away. Steps (0, 0): there is no trace."""
    self._log, self._folder, (self._first, self._last) = log, folder, steps
    self._runs = False
    self._temporary: tempfile.TemporaryDirectory | None = None
    self.program: Callable[[], Any] = lambda: None  # returns the step's plan.hlo.Program, or None

  def before(self, step: int) -> None:
    """Call it before a step; the trace of a run that is resumed in between begins there."""
    if not self._runs and self._first <= step <= self._last:
      with self._log.spent("tracing"), _warns():
        options = jax.profiler.ProfileOptions()
        if self._folder is None:  # what Python does is not read
          self._temporary = tempfile.TemporaryDirectory(prefix="step_trace")
          options.python_tracer_level, options.host_tracer_level = 0, 1
        jax.profiler.start_trace(self._path, profiler_options=options)
        self._runs = True

  def after(self, step: int, metrics: Any) -> None:
    """Call it once a step is dispatched; waits for the last one."""
    if self._runs and step == self._last:
      jax.block_until_ready(metrics)
      self.close(describe=True)

  def close(self, describe: bool = False) -> None:
    """Ends a trace that runs."""
    if not self._runs:
      return
    self._runs = False
    with self._log.spent("tracing"), _warns():
      jax.profiler.stop_trace()
      program = self.program() if describe and "://" not in self._path else None
      if program is not None:
        if line := largest_parts(program, read_trace(Path(self._path))):
          self._log.say(line)
    self.program = lambda: None  # it is large
    if self._temporary is not None:
      self._temporary.cleanup()

  @property
  def _path(self) -> str:
    return self._temporary.name if self._temporary else str(self._folder)


@contextlib.contextmanager
def _warns() -> Iterator[None]:
  """`with _warns():` whatever a profiler raises becomes a warning."""
  try:
    yield
  except Exception as error:
    logging.warning("no trace of a step: %s", one_line(error))


def make_profile(
  log: Telemetry, workdir: epath.Path, steps: tuple[int, int], start: int
) -> Profile:
  """The trace that is asked for or, on an accelerator, one of two early steps for the log line."""
  if any(steps):
    return Profile(log, workdir / "profile", steps)
  if jax.default_backend() == "cpu" or jax.process_index():
    return Profile(log, None)
  return Profile(log, None, (start + SKIPPED + 1, start + SKIPPED + TRACED))


def read_trace(folder: Path) -> dict[str, float]:
  """Seconds of each operation of a program on one device, by the latest trace in a folder."""
  files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
  seconds: dict[str, float] = collections.defaultdict(float)
  if not files:
    return seconds
  data = jax.profiler.ProfileData.from_file(str(files[-1]))
  planes = {plane.name: plane for plane in data.planes}
  devices = sorted(name for name in planes if re.match(r"/device:(TPU|GPU)", name))
  plane = planes.get(devices[0] if devices else "/host:CPU")
  lines = list(plane.lines) if plane else []
  named = [line for line in lines if line.name == "XLA Ops"]  # a TPU's: events are operations
  for line in named or lines:  # a GPU's streams and a CPU's threads: events have an operation
    for event in line.events:
      operation = event.name if named else dict(event.stats).get("hlo_op")
      if operation:
        seconds[re.match(r"%?([\w.\-]*)", str(operation))[1]] += event.duration_ns / 1e9
  return seconds


def largest_parts(program: Any, operations: Mapping[str, float], count: int = 3) -> str:
  """A log line of the parts that took longest; "" if the trace knows no operation of the program.

  A loop's own event is left out: those of its body are there.

  Args:
    program: `cc_jax.plan.hlo.Program`.
    operations: name -> seconds.
  """
  parts: dict[str, float] = collections.defaultdict(float)
  for step in program.steps:
    if seconds := operations.get(step.name):
      parts[step.collective.kind if step.collective else part_name(program, step.name)] += seconds
  total = sum(parts.values())
  if not total:
    return ""
  largest = sorted(parts.items(), key=lambda item: -item[1])[:count]
  return "largest parts of a step: " + ", ".join(
    f"{name} {seconds / total:.0%}" for name, seconds in largest
  )


def part_name(program: Any, operation: str) -> str:
  """'UNet2DCondition ResnetBlock2D backward': network, layer and pass that an operation is of.

  By the source lines in the program; elsewhere file and function, or what the operation is.
  """
  instruction = program.instructions[operation]
  own = [(file, function) for file, function in program.stack(instruction) if "/cc_jax/" in file]
  if not own:
    return instruction.opcode
  file, function = own[0]
  networks = [name for path, name in own if _NETWORK.search(path) and "." in name]
  if not networks:
    return f"{Path(file).stem}.{function}"
  words = dict.fromkeys(name.split(".")[0] for name in (networks[-1], function))
  backward = "transpose(" in (instruction.attribute(r'op_name="([^"]*)"') or "")
  return " ".join([*words, "backward" if backward else "forward"])
