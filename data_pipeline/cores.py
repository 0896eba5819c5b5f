"""How many processor cores there are for us."""

import os


def available_cores() -> int:
  """The cores that this process may run on; where the system does not say (macOS), all of them.

  A taskset or Slurm may leave it fewer than `os.cpu_count()`.
  """
  if hasattr(os, "sched_getaffinity"):  # Linux alone
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
