"""Pictures of subjects3d from factors: the same code on CPU, GPU and TPU, without tensorflow.

On a CPU each class has its own jitted program with its table folded in (6 times faster per march
step than gathering tables); on an accelerator one program renders any mixture of classes.
Backgrounds and styles are further programs: a filter inside the render program would recompute the
shading for each of its taps.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data_pipeline.errors import DataError
from data_pipeline.subjects3d import sdf, shading, shapes
from data_pipeline.subjects3d.factors import Factors

MARCH_STEPS = 24
CPU_BATCH, ACCELERATOR_BATCH = 8, 256  # pictures that a program renders at once
_MIXED = -1  # instead of a class: the program that gathers tables
_COMPILED: set[tuple[int, int, int]] = set()  # (class, resolution, batch) rendered in this process


class Rendered(NamedTuple):
  """n pictures.

  image uint8 [n, H, W, 3]; mask uint8 [n, H, W], soft alpha of the subject with its hat; coverage
  float32 [n, 4], the share of the picture covered by subject (with hat), main colour, second colour
  and pattern colour.
  """

  image: np.ndarray
  mask: np.ndarray
  coverage: np.ndarray


@functools.cache
def _subject_program(class_id: int, resolution: int):
  """jit: (factors [b], placing [b, 4], steps) -> 5 layers [b, H*W], coverage [b, 4]: `shading`."""
  tables = jnp.asarray(sdf.padded_tables()) if class_id == _MIXED else None
  maps = jnp.asarray(shapes.PATTERN_MAP)

  def one(f: Factors, place, steps):
    if class_id == _MIXED:
      rows, pattern_map = (
        sdf.rows_of_table(tables[f.class_id], f.wide, f.tall, f.ratio),
        maps[f.class_id],
      )
    else:
      rows, pattern_map = (
        sdf.rows_of_class(class_id, f.wide, f.tall, f.ratio),
        shapes.PATTERN_MAP[class_id],
      )
    return shading.subject(f, place, rows, pattern_map, resolution=resolution, steps=steps)

  return jax.jit(jax.vmap(one, in_axes=(0, 0, None)))


@functools.cache
def _compose_program(resolution: int, sequential: bool):
  """jit: (factors [b], layers) -> RGB [b, H, W, 3]."""

  def one(f_and_layers):
    return shading.compose(*f_and_layers, resolution=resolution)

  if sequential:  # a CPU then draws one scene a picture instead of all ten
    return jax.jit(lambda f, layers: lax.map(one, (f, layers)))
  return jax.jit(lambda f, layers: jax.vmap(one)((f, layers)))


@functools.cache
def _finish_program(resolution: int):
  """jit: (style [b], RGB [b, H, W, 3], alpha [b, H*W]) -> uint8 image and mask."""

  def one(style, image, alpha):
    image = shading.stylise(style, image)
    mask = alpha.reshape(resolution, resolution)
    return (image * 255 + 0.5).astype(jnp.uint8), (mask * 255 + 0.5).astype(jnp.uint8)

  return jax.jit(jax.vmap(one))


def _batches(factors: Factors, batch: int, per_class: bool):
  """Yields (class or _MIXED, rows); the last batch of a class may be short."""
  for class_id in np.unique(factors.class_id) if per_class else [_MIXED]:
    rows = np.flatnonzero(factors.class_id == class_id) if per_class else np.arange(len(factors.x))
    for start in range(0, len(rows), batch):
      yield int(class_id), rows[start : start + batch]


def render(
  factors: Factors,
  *,
  resolution: int = 64,
  batch: int | None = None,
  steps: int = MARCH_STEPS,
  per_class: bool | None = None,
) -> Rendered:
  """Renders one picture per row of `factors`; a row's picture does not depend on the others.

  Args:
    batch: pictures a program renders at once (the last batch is padded, so nothing recompiles).
    steps: of the ray march.
    per_class: one program per class instead of one for all; by default on a CPU.

  Raises:
    DataError: `factors` is empty.
  """
  n = len(factors.class_id)
  if n == 0:
    raise DataError("nothing to render: the table of factors is empty")
  on_cpu = jax.default_backend() == "cpu"
  per_class = on_cpu if per_class is None else per_class
  batch = batch or (CPU_BATCH if on_cpu else ACCELERATOR_BATCH)
  place = shapes.placing(factors)
  out = Rendered(
    np.empty((n, resolution, resolution, 3), np.uint8),
    np.empty((n, resolution, resolution), np.uint8),
    np.empty((n, 4), np.float32),
  )

  def padded(rows):
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows))])

  def draw(job):
    class_id, rows = job
    rows = padded(rows)
    return _subject_program(class_id, resolution)(factors.take(rows), place[rows], steps)

  def finish(rows, layers, coverage):
    f = factors.take(padded(rows))
    image = _compose_program(resolution, on_cpu)(f, layers)
    return *_finish_program(resolution)(f.style, image, layers[3]), coverage

  def collect(rows, pictures):
    for column, part in zip(out, pictures, strict=True):
      column[rows] = np.asarray(part)[: len(rows)]

  jobs = list(_batches(factors, batch, per_class))
  # The first batch of each class not seen before: compiled side by side, seconds each.
  fresh = [job for job in jobs if (job[0], resolution, batch) not in _COMPILED]
  fresh = list({job[0]: job for job in reversed(fresh)}.values())
  with ThreadPoolExecutor(max(1, min(len(fresh), os.cpu_count() or 1))) as pool:
    for (class_id, rows), drawn in zip(fresh, pool.map(draw, fresh), strict=True):
      collect(rows, finish(rows, *drawn))
      _COMPILED.add((class_id, resolution, batch))
  done = {(class_id, rows[0]) for class_id, rows in fresh}
  pending = None  # one batch computes while the one before is copied
  for class_id, rows in jobs:
    if (class_id, rows[0]) in done:
      continue
    pictures = finish(rows, *draw((class_id, rows)))
    if pending is not None:
      collect(*pending)
    pending = (rows, pictures)
  if pending is not None:
    collect(*pending)
  return out
