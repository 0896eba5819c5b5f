"""Apache Beam: the only module that imports it. Groups of subjects over workers."""

import contextlib
import dataclasses
import logging
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
OWN_FLAGS = ("data", "config", "out", "workers",
             *(field.name for field in dataclasses.fields(Settings)))


def run(
  task: Callable[[Any], None], items: Sequence[Any], *, workers: int, options: Sequence[str]
) -> None:
  """Calls task(item) for each item, by Beam; `task` can be pickled.

  Args:
    workers: processes on this machine, unless `options` name another runner; 0 = a process for
      every core.
    options: Beam's own pipeline options.

  Raises DataError: what a task raised as such, Beam is missing, or its options are wrong.
  """
  if not items:
    return
  beam, pipeline_options = _import_beam()
  elsewhere = any(re.match("--runner(=|$)", option) for option in options)
  count = 1 if elsewhere else min(workers or available_cores(), len(items))
  flags = [*options, f"--direct_num_workers={count}"]
  try:
    with _without_chatter(), beam.Pipeline(None if elsewhere else _local_runner(count),
                                 pipeline_options(flags)) as pipeline:
      (pipeline | "items" >> beam.Create(items) | "to workers" >> beam.Reshuffle()
       | "prepare" >> beam.Map(task))  # fmt: skip
  except Exception as error:
    # Of what another process raised there is a text only; Beam adds where it happened.
    text = f"DataError: {error}" if isinstance(error, DataError) else str(error)
    said = re.findall(r"DataError: (.+?)(?: \[while running|\\n|\n|$)", text)
    if said:
      raise DataError(said[-1]) from error
    raise


def _local_runner(count: int):
  """Beam's runner for one machine: in this process, or in `count` others."""
  from apache_beam.runners.portability.fn_api_runner import FnApiRunner
  from apache_beam.transforms.environments import SubprocessSDKEnvironment

  if count == 1:
    return FnApiRunner()
  command = f"{shlex.quote(sys.executable)} -m data_pipeline.prepare.worker"
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
  """Stops what Beam writes where nothing is wrong, and tracebacks of what a user can mend."""

  def filter(self, record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], DataError):
      return False
    return not any(text in record.getMessage() for text in _CHATTER)


_FILTER = _Chatter()
_FILTERED = ("apache_beam.runners.portability.fn_api_runner.fn_runner",
             "apache_beam.runners.common")


@contextlib.contextmanager
def _without_chatter():
  """Without Beam's lines about its own doings, which it writes at INFO."""
  logger = logging.getLogger("apache_beam")
  level = logger.level
  logger.setLevel(logging.WARNING)
  stop_chatter()
  try:
    yield
  finally:
    logger.setLevel(level)
    for name in _FILTERED:
      logging.getLogger(name).removeFilter(_FILTER)


def stop_chatter() -> None:
  """In this process, see `_Chatter`."""
  for name in _FILTERED:
    logging.getLogger(name).addFilter(_FILTER)
