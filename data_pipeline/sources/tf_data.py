"""The one door to tensorflow: its import, and tf.data as the parallel executor of rows."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.example import SIGNATURE


def import_tensorflow():
  """The module, kept off the accelerators (they are jax's) and off the network."""
  # TFDS and tensorflow probe cloud storage at import; on a closed network that costs minutes.
  os.environ.setdefault("NO_GCE_CHECK", "true")
  if "tensorflow" in sys.modules:
    return _on_cpu()
  with _without_native_log():
    return _on_cpu()


def _on_cpu():
  try:
    import tensorflow as tf
  except ImportError:
    raise DataError(
        "tensorflow is not installed; use data.source='render', or pip install tensorflow"
    ) from None
  for kind in ("GPU", "TPU"):
    try:
      tf.config.set_visible_devices([], kind)
    except RuntimeError:  # somebody used it before us; they have chosen their devices
      pass
  return tf


@contextlib.contextmanager
def _without_native_log():
  """Drops the lines about CPU features and absent GPUs, which no setting of tensorflow 2.21 stops.

  They are written to the file descriptor; whatever else was written meanwhile is passed on.
  """
  sys.stderr.flush()
  with tempfile.TemporaryFile() as log:
    stderr = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(stderr, 2)
      os.close(stderr)
      log.seek(0)
      lines = log.read().splitlines(keepends=True)
      own = rb"[IWE]\d{4} |WARNING: All log messages|To enable the following instructions"
      os.write(2, b"".join(line for line in lines if not re.match(own, line)))


def import_tfds():
  """tensorflow_datasets, after `import_tensorflow`."""
  import_tensorflow()
  import tensorflow_datasets as tfds

  return tfds


def batches(
    make_row: Callable[[int, int], dict[str, np.ndarray]], *, start_step: int, rows: range
) -> Iterator[dict[str, np.ndarray]]:
  """Endless batches of make_row(step, row) for the rows of this host, from `start_step` on.

  make_row is a pure function, so that the start costs nothing and the order of the threads does
  not matter; its parts that are slow (reading, decoding, resizing) release the interpreter's lock.
  """
  tf = import_tensorflow()
  failures: list[Exception] = []

  def row_of(index: np.ndarray) -> tuple[np.ndarray, ...]:
    step, row = divmod(int(index), len(rows))
    try:
      example = make_row(step, rows[row])
    except Exception as error:  # tensorflow would turn it into a page of its own words
      failures.append(error)
      raise
    return tuple(example[key] for key in SIGNATURE)

  def load(index):
    values = tf.numpy_function(row_of, [index], list(SIGNATURE.values()))
    return dict(zip(SIGNATURE, values, strict=True))

  first = start_step * len(rows)
  data = tf.data.Dataset.range(first, np.iinfo(np.int64).max)
  # Rows are partly Python, which runs in one thread at a time: many threads would be in the way.
  data = data.map(load, num_parallel_calls=min(16, os.cpu_count() or 1), deterministic=True)
  data = data.batch(len(rows)).prefetch(2)
  options = tf.data.Options()
  options.deterministic = True
  # Nothing is left to tune, and its thread looks up every 10 s only: the end would wait for it.
  options.autotune.enabled = False
  iterator = iter(data.with_options(options).as_numpy_iterator())
  return _with_own_errors(tf, iterator, failures)


def _with_own_errors(tf, iterator, failures) -> Iterator[dict[str, np.ndarray]]:
  while True:
    try:
      yield next(iterator)
    except tf.errors.OpError:
      if not failures:
        raise
      raise failures[0] from None
