"""Bulk rendering: several single-threaded processes fill the cores better than one with many threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os

import jax
import numpy as np
from tqdm import tqdm

from data_pipeline.subjects3d import renderer
from data_pipeline.subjects3d.factors import Factors

CHUNK = 256  # pictures of one class that a worker takes at a time
_FEW = 2000  # below, starting processes costs more than it saves
_WORKER_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  "NPROC": "1",
  "PJRT_NPROC": "1",
  "OMP_NUM_THREADS": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


@contextlib.contextmanager
def _environment(values: dict[str, str]):
  """Sets variables while the workers start: a spawned process inherits them before it imports jax."""
  before = {name: os.environ.get(name) for name in values}
  os.environ.update(values)
  try:
    yield
  finally:
    for name, value in before.items():
      os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _chunks(factors: Factors) -> list[np.ndarray]:
  """Rows in chunks of one class, class by class, so that a worker meets few classes at a time."""
  chunks = []
  for class_id in np.unique(factors.class_id):
    members = np.flatnonzero(factors.class_id == class_id)
    chunks += [members[k : k + CHUNK] for k in range(0, len(members), CHUNK)]
  return chunks


def _work(job):
  rows, factors, resolution = job
  return rows, tuple(renderer.render(factors, resolution=resolution))


def render_many(factors: Factors, *, resolution: int, processes: int | None, progress: bool) -> renderer.Rendered:
  """See `renderer.render_many`."""
  n = len(factors.class_id)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  processes = processes or (cores if n >= _FEW else 1)
  jobs = ((rows, factors.take(rows), resolution) for rows in _chunks(factors))
  out = renderer.Rendered(
    np.empty((n, resolution, resolution, 3), np.uint8),
    np.empty((n, resolution, resolution), np.uint8),
    np.empty((n, 4), np.float32),
  )
  with contextlib.ExitStack() as stack:
    bar = stack.enter_context(tqdm(total=n, desc="rendering", unit="image", disable=not progress))
    if processes == 1 or jax.default_backend() != "cpu":
      if jax.default_backend() != "cpu":
        jobs = ((np.arange(k, min(k + 4096, n)),) for k in range(0, n, 4096))
        jobs = ((rows, factors.take(rows), resolution) for (rows,) in jobs)
      results = map(_work, jobs)
    else:
      with _environment(_WORKER_ENVIRONMENT):
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
      results = pool.imap_unordered(_work, jobs)
    for rows, parts in results:
      for column, part in zip(out, parts, strict=True):
        column[rows] = part
      bar.update(len(rows))
  return out
