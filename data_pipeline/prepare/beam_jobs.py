"""Apache Beam: the only module that imports it. Groups of subjects over workers."""

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline.cores import available_cores
from data_pipeline.errors import DataError
from data_pipeline.prepare.settings import Settings
from data_pipeline.sources import listing

# What Beam 2.77 says where nothing is wrong: of Google's cloud, which is not used, and of workers
# that are other processes because of `_local_runner` and not by an option.
_CHATTER = ("apitools not found", "direct_running_mode should be")
OWN_FLAGS = ("data", "layout", "config", "out", "workers",
             *(field.name for field in dataclasses.fields(Settings)))


def run(
  task: Callable[[Any], None], items: Sequence[Any], *, workers: int, options: Sequence[str]
) -> None:
  """Calls task(item) for each item, by Beam; `task` can be pickled.

  Args:
    workers: processes on this machine, unless `options` name another runner; 0 = a process for
      every core.
    options: Beam's own pipeline options.

  Raises DataError where Beam is missing.
  """
  if not items:
    return
  beam, pipeline_options = _import_beam()
  elsewhere = any(re.match("--runner(=|$)", option) for option in options)
  count = 1 if elsewhere else min(workers or available_cores(), len(items))
  flags = [*options, f"--direct_num_workers={count}"]
  runner = None if elsewhere else _local_runner(count)
  with _without_chatter(), beam.Pipeline(runner, pipeline_options(flags)) as pipeline:
    (pipeline | "items" >> beam.Create(items) | "to workers" >> beam.Reshuffle()
     | "prepare" >> beam.Map(task))  # fmt: skip


def _local_runner(count: int):
  """Beam's runner for one machine: in this process, or in `count` others."""
  from apache_beam.runners.portability.fn_api_runner import FnApiRunner
  from apache_beam.transforms.environments import SubprocessSDKEnvironment

  if count == 1:
    return FnApiRunner()
  # Beam hands it to a shell. A terminal's Ctrl-C is for this process, which ends the others.
  command = "trap '' INT; exec " if os.name == "posix" else ""
  command += f"{shlex.quote(sys.executable)} -m data_pipeline.prepare.worker"
  return FnApiRunner(default_environment=SubprocessSDKEnvironment(command_string=command))


def check_options(options: Sequence[str]) -> None:
  """Raises DataError for what is no pipeline option of Beam, which itself would only warn."""
  _, pipeline_options = _import_beam()
  known = sorted(pipeline_options([]).get_all_options())
  for option in options:
    name = option.lstrip("-").partition("=")[0].removeprefix("no_")
    if not option.startswith("--") or (name not in known and f"no_{name}" not in known):
      raise DataError(f"{option} is neither a flag of the preparation nor an option of Beam, "
                      f"--name=value{listing.nearest(name, [*OWN_FLAGS, *known])}; see --help")


def _import_beam():
  try:
    logging.getLogger().addFilter(_FILTER)
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError:
    raise DataError("apache_beam, which spreads the preparation over workers, is not installed; "
                    "pip install apache-beam") from None
  finally:
    logging.getLogger().removeFilter(_FILTER)
  return beam, PipelineOptions


class _Chatter(logging.Filter):
  """Stops what Beam writes where nothing is wrong."""

  def filter(self, record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _CHATTER)


_FILTER = _Chatter()


@contextlib.contextmanager
def _without_chatter():
  """Without Beam's lines about its own doings, which it writes at INFO."""
  logger = logging.getLogger("apache_beam")
  runner = logging.getLogger("apache_beam.runners.portability.fn_api_runner.fn_runner")
  level = logger.level
  logger.setLevel(logging.WARNING)
  runner.addFilter(_FILTER)
  try:
    yield
  finally:
    logger.setLevel(level)
    runner.removeFilter(_FILTER)
