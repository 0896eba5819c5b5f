"""SIGTERM, which is how schedulers and clouds say that a machine is about to be taken away."""

from __future__ import annotations

import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # what a shell shows of a process that SIGTERM ended


class Preemption:
  """`with Preemption() as preemption:` the loop asks after each step whether it shall stop.

  A second SIGTERM ends the process at once. Several processes stop after the same step, whichever
  was told first: there JAX's own service receives the signal and agrees on the step.
  """

  def __init__(self):
    self._told = False
    self._before = None

  def __enter__(self) -> Preemption:
    # Python takes signals in the main thread only; a notebook's or a test's thread goes without.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._tell)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def stops_after(self, step: int) -> bool:
    """Whether `step` is the last one; with several processes all must ask after every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._told

  def _tell(self, *_) -> None:
    self._told = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
