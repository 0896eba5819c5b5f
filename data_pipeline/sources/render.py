"""Triples of subjects3d rendered on the fly: endless views, without files and tensorflow."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipeline import sampling
from data_pipeline.example import Maker, stack
from data_pipeline.subjects3d import captions, factors, renderer

_AHEAD = 2  # batches that are prepared while another is used


def batches(maker: Maker, *, split: str, start_step: int, rows: range) -> Iterator[dict]:
  """Endless batches from `start_step` on, rendered by a background thread."""
  subjects = factors.subjects(split)
  table = sampling.SubjectTable(subjects.subject_id, subjects.family_id, subjects.class_id)
  maker.check(table)
  return _prefetched(lambda step: make_batch(maker, subjects, table, step, rows), start_step)


def make_batch(
    maker: Maker, subjects: factors.Subjects, table: sampling.SubjectTable, step: int, rows: range
) -> dict[str, np.ndarray]:
  """Rows `rows` of the global batch of one step: a pure function of its arguments."""
  chosen = maker.subjects(table, step)
  rngs = [maker.rng(step, row) for row in rows]
  views = factors.concatenate(
      [three_views(rng, subjects.take(chosen[[row] * 3])) for rng, row in zip(rngs, rows)]
  )
  roles = np.asarray(maker.frames((0, 1, 2)))
  views = views.take((np.arange(0, 3 * len(rngs), 3)[:, None] + roles).ravel())
  rendered = renderer.render(views, resolution=maker.triple.image_size)
  examples = []
  for n, (rng, row) in enumerate(zip(rngs, rows)):
    frames = slice(3 * n, 3 * n + 3)
    caption = captions.caption(rng, views.take(3 * n + 2))
    examples.append(maker.example(
        rng, table, chosen[row], rendered.image[frames], rendered.mask[frames],
        caption.text, caption.noun,
    ))
  return stack(examples)


def three_views(rng: np.random.Generator, subject: factors.Subjects) -> factors.Factors:
  """Frames i, j, k of `subject` (three equal rows); i and j, as references, are photos, no hat."""
  views = factors.sample_factors(rng, subject)
  views.style[:2] = 0
  views.hat[:2] = 0
  return views


def _prefetched(make, start_step: int) -> Iterator[dict]:
  """make(start_step), make(start_step + 1), ..., each computed before it is needed."""
  with ThreadPoolExecutor(1, thread_name_prefix="render") as pool:
    step, pending = start_step, deque()
    try:
      while True:
        while len(pending) <= _AHEAD:
          pending.append(pool.submit(make, step))
          step += 1
        yield pending.popleft().result()
    finally:
      for future in pending:
        future.cancel()
