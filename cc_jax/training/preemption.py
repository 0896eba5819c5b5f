"""SIGTERM, with which schedulers and clouds announce that they take a machine away."""

from __future__ import annotations

import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # a shell's code for a process that SIGTERM ended


class Preemption:
  """`with Preemption() as preemption:` the loop asks after each step whether to stop.

  A second SIGTERM ends the process at once. Several processes stop after the same step, whichever
  got the signal: there JAX's own service receives it and agrees on the step.
  """

  def __init__(self):
    self._received = False
    self._handler_before = None

  def __enter__(self) -> Preemption:
    # Python handles signals in the main thread only; a notebook's other threads go without.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._handler_before = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *_) -> None:
    if self._handler_before is not None:
      signal.signal(signal.SIGTERM, self._handler_before)

  def stops_after(self, step: int) -> bool:
    """Whether to stop after `step`; of several processes all must ask after every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def _receive(self, *_) -> None:
    self._received = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
