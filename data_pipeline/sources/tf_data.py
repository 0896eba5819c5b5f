"""The only module that imports tensorflow, and tf.data as the parallel executor of rows."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from data_pipeline.cores import available_cores
from data_pipeline.errors import DataError


def import_tensorflow():
  """The module, without access to accelerators (JAX uses them) and network."""
  # TFDS and tensorflow probe cloud storage at import; without a network that takes minutes.
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
    except RuntimeError:  # other code has initialized tensorflow, with devices of its choice
      pass
  return tf


@contextlib.contextmanager
def _without_native_log():
  """Drops the lines about CPU features and missing GPUs, which tensorflow 2.21 always prints.

  They are written to the file descriptor; everything else that is written there is passed on.
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
      native = rb"[IWE]\d{4} |WARNING: All log messages|To enable the following instructions"
      os.write(2, b"".join(line for line in lines if not re.match(native, line)))


def import_tfds():
  """tensorflow_datasets, after `import_tensorflow`."""
  import_tensorflow()
  import tensorflow_datasets as tfds

  return tfds


def batches(
    make_row: Callable[[int, int], dict[str, np.ndarray]], signature: dict[str, type], *,
    start_step: int, rows: range,
) -> Iterator[dict[str, np.ndarray]]:
  """Endless batches of make_row(step, row) for the rows of this host, from `start_step` on.

  make_row is a pure function, so any start_step is free and the order of the threads does not
  matter; its slow parts (reading, decoding, resizing) release the GIL. `signature`: the keys and
  types of what it returns.
  """
  tf = import_tensorflow()
  errors: list[Exception] = []

  def row_of(index: np.ndarray) -> tuple[np.ndarray, ...]:
    step, row = divmod(int(index), len(rows))
    try:
      example = make_row(step, rows[row])
    except Exception as error:  # tensorflow would hide it in a long message
      errors.append(error)
      raise
    return tuple(example[key] for key in signature)

  def load(index):
    values = tf.numpy_function(row_of, [index], list(signature.values()))
    return dict(zip(signature, values, strict=True))

  first = start_step * len(rows)
  data = tf.data.Dataset.range(first, np.iinfo(np.int64).max)
  # Rows are partly Python, which runs in one thread at a time: more threads would only wait.
  data = data.map(load, num_parallel_calls=min(16, available_cores()), deterministic=True)
  data = data.batch(len(rows)).prefetch(2)
  options = tf.data.Options()
  options.deterministic = True
  # There is nothing to tune, and its thread wakes every 10 s only, which delays the exit.
  options.autotune.enabled = False
  iterator = iter(data.with_options(options).as_numpy_iterator())
  return with_original_errors(tf, iterator, errors)


def with_original_errors(tf, iterator, errors) -> Iterator[dict[str, np.ndarray]]:
  """The iterator's batches; for tensorflow's error the one that a Python function raised."""
  while True:
    try:
      yield next(iterator)
    except tf.errors.OpError:
      if not errors:
        raise
      raise errors[0] from None
