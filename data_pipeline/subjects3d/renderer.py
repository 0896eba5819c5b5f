"""Pictures of subjects3d from factors: the same code on CPU, GPU and TPU, without tensorflow.

On a CPU each class has a jitted program with its table as constants (6 times faster per march step
than gathering tables); on an accelerator one program renders any mixture of classes. Backgrounds
and styles are separate programs: a filter inside the render program would recompute the shading for
each of its taps.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data_pipeline.cores import available_cores
from data_pipeline.errors import DataError
from data_pipeline.subjects3d import sdf, shading, shapes
from data_pipeline.subjects3d.factors import Factors

MARCH_STEPS = 24
CPU_BATCH, ACCELERATOR_BATCH = 8, 256  # pictures that a program renders at once
_MIXED = -1  # instead of a class: the program for all classes, which gathers tables
_COMPILED: set[tuple[int, int, int]] = set()  # (class, resolution, batch) rendered in this process


class Rendered(NamedTuple):
  """n pictures.

  image uint8 [n, H, W, 3]; mask uint8 [n, H, W], soft alpha of the subject with its hat; coverage
  float32 [n, 4], the fractions of the picture covered by subject (with hat), main colour, second
  colour and pattern colour.
  """

  image: np.ndarray
  mask: np.ndarray
  coverage: np.ndarray


@functools.cache
def _subject_program(class_id: int, resolution: int):
  """jit: (factors [b], placing [b, 4], steps) -> 5 layers [b, H*W], coverage [b, 4]: `shading`."""
  tables = jnp.asarray(sdf.padded_tables()) if class_id == _MIXED else None
  maps = jnp.asarray(shapes.PATTERN_MAP)

  def render_one(f: Factors, placing, steps):
    if class_id == _MIXED:
      rows = sdf.rows_of_table(tables[f.class_id], f.wide, f.tall, f.ratio)
      pattern_map = maps[f.class_id]
    else:
      rows = sdf.rows_of_class(class_id, f.wide, f.tall, f.ratio)
      pattern_map = shapes.PATTERN_MAP[class_id]
    return shading.subject(f, placing, rows, pattern_map, resolution=resolution, steps=steps)

  return jax.jit(jax.vmap(render_one, in_axes=(0, 0, None)))


@functools.cache
def _compose_program(resolution: int, sequential: bool):
  """jit: (factors [b], layers) -> RGB [b, H, W, 3]."""

  def compose_one(f_and_layers):
    return shading.compose(*f_and_layers, resolution=resolution)

  if sequential:  # a CPU then draws one scene per picture instead of all ten
    return jax.jit(lambda f, layers: lax.map(compose_one, (f, layers)))
  return jax.jit(lambda f, layers: jax.vmap(compose_one)((f, layers)))


@functools.cache
def _finish_program(resolution: int):
  """jit: (style [b], RGB [b, H, W, 3], alpha [b, H*W]) -> uint8 image and mask."""

  def finish_one(style, image, alpha):
    image = shading.stylise(style, image)
    mask = alpha.reshape(resolution, resolution)
    return (image * 255 + 0.5).astype(jnp.uint8), (mask * 255 + 0.5).astype(jnp.uint8)

  return jax.jit(jax.vmap(finish_one))


def _batches(factors: Factors, batch: int, per_class: bool):
  """Yields (class or _MIXED, rows); the last batch of a class may be short."""
  for class_id in np.unique(factors.class_id) if per_class else [_MIXED]:
    rows = np.flatnonzero(factors.class_id == class_id) if per_class else np.arange(len(factors.x))
    for start in range(0, len(rows), batch):
      yield int(class_id), rows[start : start + batch]


def render(
  factors: Factors, *, resolution: int = 64, batch: int | None = None, steps: int = MARCH_STEPS,
  per_class: bool | None = None,
) -> Rendered:
  """Renders one picture per row of `factors`; a row's picture does not depend on the others.

  Args:
    batch: pictures that a program renders at once (the last batch is padded: no recompilation).
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
  placing = shapes.placing(factors)
  out = Rendered(
    np.empty((n, resolution, resolution, 3), np.uint8),
    np.empty((n, resolution, resolution), np.uint8), np.empty((n, 4), np.float32),
  )

  def padded(rows):
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows))])

  def render_subjects(job):
    class_id, rows = job
    rows = padded(rows)
    return _subject_program(class_id, resolution)(factors.take(rows), placing[rows], steps)

  def finish(rows, layers, coverage):
    f = factors.take(padded(rows))
    image = _compose_program(resolution, on_cpu)(f, layers)
    return *_finish_program(resolution)(f.style, image, layers[3]), coverage

  def collect(rows, pictures):
    for column, part in zip(out, pictures, strict=True):
      column[rows] = np.asarray(part)[: len(rows)]

  jobs = list(_batches(factors, batch, per_class))
  # The first batch of each class without a compiled program: compiled in parallel, seconds each.
  uncompiled = [job for job in jobs if (job[0], resolution, batch) not in _COMPILED]
  uncompiled = list({job[0]: job for job in reversed(uncompiled)}.values())
  with ThreadPoolExecutor(max(1, min(len(uncompiled), available_cores()))) as pool:
    outputs = pool.map(render_subjects, uncompiled)
    for (class_id, rows), output in zip(uncompiled, outputs, strict=True):
      collect(rows, finish(rows, *output))
      _COMPILED.add((class_id, resolution, batch))
  finished = {(class_id, rows[0]) for class_id, rows in uncompiled}
  pending = None  # a batch is computed while the previous one is copied
  for class_id, rows in jobs:
    if (class_id, rows[0]) in finished:
      continue
    pictures = finish(rows, *render_subjects((class_id, rows)))
    if pending is not None:
      collect(*pending)
    pending = (rows, pictures)
  if pending is not None:
    collect(*pending)
  return out
