"""Pictures of subjects3d from factors: the same code on CPU, GPU and TPU, without tensorflow.

On a CPU each class has its own jitted program with its table folded in (6 times faster per march step than
gathering tables); on an accelerator one program renders any mixture of classes. Backgrounds and styles are
further programs: a filter inside the render program would recompute the shading for each of its taps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data_pipeline.errors import DataError
from data_pipeline.subjects3d import sdf, shading, shapes
from data_pipeline.subjects3d.factors import Factors

MARCH_STEPS = 24
BATCH = {"cpu": 16}  # pictures a program renders at once; 256 on accelerators
_MIXED = -1  # instead of a class: the program that gathers tables


class Rendered(NamedTuple):
  """n pictures: image uint8 [n, H, W, 3]; mask uint8 [n, H, W], soft alpha of the subject with its hat;
  coverage float32 [n, 4], the share of the picture covered by subject, main colour, second colour and
  pattern colour."""

  image: np.ndarray
  mask: np.ndarray
  coverage: np.ndarray


@functools.cache
def _subject_program(class_id: int, resolution: int, steps: int):
  """jit: (factors [b], placing [b, 3]) -> ((r, g, b, alpha, shadow) each [b, H*W], coverage [b, 4])."""
  tables = jnp.asarray(sdf.padded_tables()) if class_id == _MIXED else None
  maps = jnp.asarray(shapes.PATTERN_MAP)

  def one(f: Factors, place):
    if class_id == _MIXED:
      rows, pattern_map = sdf.rows_of_table(tables[f.class_id], f.wide, f.tall, f.ratio), maps[f.class_id]
    else:
      rows, pattern_map = sdf.rows_of_class(class_id, f.wide, f.tall, f.ratio), shapes.PATTERN_MAP[class_id]
    return shading.subject(f, place, rows, pattern_map, resolution=resolution, steps=steps)

  return jax.jit(jax.vmap(one))


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


def _render_batch(f: Factors, place, class_id: int, resolution: int, steps: int, sequential: bool):
  layers, coverage = _subject_program(class_id, resolution, steps)(f, place)
  image = _compose_program(resolution, sequential)(f, layers)
  image, mask = _finish_program(resolution)(f.style, image, layers[3])
  return image, mask, coverage


def render(
  factors: Factors, *, resolution: int = 64, batch: int | None = None, steps: int = MARCH_STEPS,
  per_class: bool | None = None,
) -> Rendered:  # fmt: skip
  """Renders one picture per row of `factors`, in their order; a row's picture does not depend on the others.

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
  platform = jax.default_backend()
  per_class = platform == "cpu" if per_class is None else per_class
  batch = batch or BATCH.get(platform, 256)
  place = shapes.placing(factors)
  out = Rendered(
    np.empty((n, resolution, resolution, 3), np.uint8),
    np.empty((n, resolution, resolution), np.uint8),
    np.empty((n, 4), np.float32),
  )
  classes = np.unique(factors.class_id) if per_class else [_MIXED]
  pending = []  # one batch computes while the previous one is copied
  for class_id in classes:
    members = np.flatnonzero(factors.class_id == class_id) if per_class else np.arange(n)
    for start in range(0, len(members), batch):
      rows = members[start : start + batch]
      padded = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows))])
      parts = _render_batch(
        factors.take(padded), place[padded], int(class_id), resolution, steps, platform == "cpu"
      )
      pending.append((rows, parts))
      if len(pending) > 1:
        _collect(out, *pending.pop(0))
  for rows, parts in pending:
    _collect(out, rows, parts)
  return out


def _collect(out: Rendered, rows, parts) -> None:
  for column, part in zip(out, parts, strict=True):
    column[rows] = np.asarray(part)[: len(rows)]


def render_many(
  factors: Factors, *, resolution: int = 64, processes: int | None = None, progress: bool = True
) -> Rendered:
  """`render` for bulk: the same pictures, by several single-threaded processes on a CPU.

  Args:
    processes: default one per core this process may use; 1, few pictures, or an accelerator stay in process.
    progress: a bar with rate and time left.
  """
  from data_pipeline.subjects3d import bulk

  return bulk.render_many(factors, resolution=resolution, processes=processes, progress=progress)
