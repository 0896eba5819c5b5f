"""Batches of triples by tf.data and TensorFlow operations: reading, decoding, placing.

`plan` says in numpy what a batch shows; everything that costs time is a TensorFlow operation on a
thread of tf.data. A row that these cannot make as `data_pipeline.triples` does (see `files`), or
one of its pictures is broken, is made by Pillow instead, which also finds what takes the place of
bad pictures. So all of a batch is a pure function of (seed, step), here as there.
"""

import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from data_pipeline import sampling
from data_pipeline.cores import available_cores
from data_pipeline.errors import DataError
from data_pipeline.example import PICTURES, Maker
from data_pipeline.graph import pictures
from data_pipeline.graph.plan import FRAME, LAYOUTS, ROW, Planner
from data_pipeline.manifest import FrameRow
from data_pipeline.manifest_frames import open_blob
from data_pipeline.sources import tf_data

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_LARGE = 500_000  # pixels


def choose(decoder: str, maker: Maker, subjects: Any) -> bool:
  """Whether `data.decoder` means TensorFlow for these subjects.

  'auto' does where pictures are large JPEGs, of which only a part has to be decoded, as the first
  one tells: a loader of operations takes seconds to start. Raises DataError for 'tensorflow' where
  that cannot be.
  """
  if decoder not in sampling.DECODERS:
    known = ", ".join(sampling.DECODERS)
    raise DataError(f"data.decoder={decoder!r} is unknown; choose one of {known}")
  if decoder == "pillow":
    return False
  subject = subjects[0]
  layout = maker.triple.reference_layout
  if maker.cache is not None:
    problem = "data.cached=True reads no pictures"
  elif layout not in LAYOUTS:
    problem = f"references of data.reference_layout={layout!r} are made by Pillow"
  elif not hasattr(subject, "files"):
    problem = "it reads pictures in files, those of 'folder' and of captures"
  else:
    return decoder == "tensorflow" or _is_large_jpeg(*subject.files(0))
  if decoder == "tensorflow":
    raise DataError(f"data.decoder='tensorflow' cannot be used: {problem}; set it to 'auto'")
  return False


def _is_large_jpeg(root: str, frame: FrameRow) -> bool:
  if not frame.picture.lower().endswith(_JPEG):
    return False
  height, width = frame.height, frame.width
  if not height:
    try:
      blob = open_blob(root, frame.picture, frame.picture_offset, frame.picture_length)
      width, height = Image.open(io.BytesIO(blob)).size
    except (DataError, OSError, Image.DecompressionBombError):
      return False  # who reads it to show it will say what is wrong
  return height * width >= _LARGE


def batches(
  maker: Maker, subjects, numbers: np.ndarray, table: sampling.SubjectTable, make_row, *,
  start_step: int, rows: range,
) -> Iterator[dict[str, np.ndarray]]:
  """Endless batches, as `tf_data.batches(make_row, ...)` yields them to within 2 levels.

  Args:
    maker, subjects, numbers, table: see `plan.Planner`.
    make_row: make_row(step, row) makes a row by Pillow.
    start_step, rows: of `data_pipeline.make_loader`.
  """
  tf = tf_data.import_tensorflow()
  errors: list[Exception] = []
  data = dataset(maker, Planner(maker, subjects, numbers, table, rows), make_row, errors,
                 start_step=start_step, count=len(rows), name=subjects.where)  # fmt: skip
  return tf_data.with_original_errors(tf, iter(data.as_numpy_iterator()), errors)


def dataset(maker: Maker, planner: Planner, make_row, errors: list, *, start_step: int, count: int,
            name: str):
  """The tf.data.Dataset of `batches`."""
  tf = tf_data.import_tensorflow()
  signature, size = maker.signature, maker.triple.image_size
  kinds = {key: tf.string if kind is object else tf.as_dtype(kind)
           for key, (kind, _) in ROW.items()} | planner.labels  # fmt: skip
  shapes = {key: shape for key, (_, shape) in ROW.items()} | planner.label_shapes
  row_shapes = {key: [size, size, 3] for key in PICTURES} | planner.label_shapes
  row_shapes["target_mask"] = [size, size]
  slow = _Slow(make_row, signature, errors, name)

  plain = tf.autograph.experimental.do_not_convert  # nothing here is to be rewritten

  def plan(step):
    values = tf.numpy_function(
      _kept(lambda s: tuple(planner(s)[key] for key in kinds), errors), [step],
      list(kinds.values()))
    return {key: tf.ensure_shape(value, [count, *shapes[key]])
            for key, value in zip(kinds, values, strict=True)}  # fmt: skip

  # Functions of their own are traced once, and not for each of the frames.
  open_frame = tf.function(pictures.open_frame, autograph=False)
  place = tf.function(pictures.place, autograph=False)

  def show(row):
    frames = [{key: row[key][n] for key in FRAME} for n in range(3)]
    positive, reference, target = map(open_frame, frames)
    places = [place(frame, size, row["ratio"][n], row["position"][n])
              for n, frame in enumerate((positive, reference))]  # fmt: skip
    return (*places, *pictures.square(target, size), True)

  nothing = tuple(np.zeros(row_shapes[key], np.uint8) for key in PICTURES) + (False,)

  def load(row):
    def tried():
      # The only way to catch an operation's error in a graph: a data set of one element.
      attempt = tf.data.Dataset.from_tensors(row).map(plain(show)).ignore_errors()
      fallback = tf.data.Dataset.from_tensors(nothing)
      return attempt.concatenate(fallback).take(1).get_single_element()

    *shown, is_made = tf.cond(row["usable"], tried, lambda: tuple(map(tf.constant, nothing)))
    made = dict(zip(PICTURES, shown)) | {key: row[key] for key in planner.labels}

    def by_pillow():
      values = tf.numpy_function(slow, [row["step"], row["row"]], list(signature.values()))
      return tuple(values)

    values = tf.cond(is_made, lambda: tuple(made[key] for key in signature), by_pillow)
    return {key: tf.ensure_shape(value, row_shapes[key])
            for key, value in zip(signature, values, strict=True)}  # fmt: skip

  threads = available_cores()
  data = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  data = data.map(plain(plan), num_parallel_calls=1, deterministic=True).unbatch()
  data = data.map(plain(load), num_parallel_calls=threads, deterministic=True)
  data = data.batch(count).prefetch(2)
  options = tf.data.Options()
  options.deterministic = True
  # There is nothing to tune, and its thread wakes every 10 s only, which delays the exit.
  options.autotune.enabled = False
  # Rows run side by side: an operation that is divided among threads would only wait for them.
  options.threading.max_intra_op_parallelism = 1
  return data.with_options(options)


def _kept(function, errors: list):
  """Tensorflow would hide an error in a long message."""

  def call(*args):
    try:
      return function(*args)
    except Exception as error:
      errors.append(error)
      raise

  return call


class _Slow:
  """Rows by Pillow, with a word about how many they are."""

  def __init__(self, make_row, signature, errors: list, name: str):
    self._make_row, self._signature = _kept(make_row, errors), signature
    self._name, self._count, self._lock = name, 0, threading.Lock()

  def __call__(self, step, row):
    with self._lock:
      self._count += 1
      count = self._count
    if count & (count - 1) == 0 and count >= 8:  # a power of two
      logging.warning(
        "%s: %d rows so far have pictures that TensorFlow does not read as Pillow does (or broken "
        "ones), and were made by Pillow, which is slower", self._name, count)
    example = self._make_row(int(step), int(row))
    return tuple(example[key] for key in self._signature)
