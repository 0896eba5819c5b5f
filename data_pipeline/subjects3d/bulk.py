"""Bulk rendering: single-threaded processes fill the cores better than one process with threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue

import jax
import numpy as np
from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.subjects3d import renderer
from data_pipeline.subjects3d.factors import Factors

CHUNK = 256  # pictures between two steps of the progress bar
_FEW = 4000  # below, starting processes costs more than it saves
_WORKER_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  "NPROC": "1",
  "PJRT_NPROC": "1",
  "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def _environment(values: dict[str, str]):
  """Sets variables while workers start: a spawned process inherits them before it imports jax."""
  before = {name: os.environ.get(name) for name in values}
  os.environ.update(values)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def _work(rows, factors: Factors, resolution: int, results) -> None:
  """A process: renders `factors` piecewise; `rows` is where they belong in the whole."""
  for start in range(0, len(rows), CHUNK):
    piece = slice(start, start + CHUNK)
    pictures = renderer.render(factors.take(piece), resolution=resolution)
    results.put((rows[piece], tuple(pictures)))


def _by_processes(factors: Factors, rows, resolution: int, processes: int):
  """Yields (rows, pictures) as they come. Each process gets one stretch of `rows`."""
  context = multiprocessing.get_context("spawn")
  results = context.Queue(maxsize=4 * processes)
  workers = []
  try:
    with _environment(_WORKER_ENVIRONMENT):
      for stretch in np.array_split(rows, processes):
        job = (stretch, factors.take(stretch), resolution, results)
        worker = context.Process(target=_work, args=job, daemon=True)
        worker.start()
        workers.append(worker)  # once it runs: what never started cannot be terminated
    left = len(rows)
    while left:
      try:
        done, pictures = results.get(timeout=2)
      except queue.Empty:
        if any(w.exitcode not in (None, 0) for w in workers):
          raise DataError(
            "a rendering process died (its message is above; too little memory?): use processes=1"
          ) from None
        continue
      left -= len(done)
      yield done, pictures
  finally:
    for worker in workers:
      worker.terminate()
      worker.join()


def render_many(
  factors: Factors, *, resolution: int = 64, processes: int | None = None, progress: bool = True
) -> renderer.Rendered:
  """`renderer.render` for bulk: the same pictures, by several single-threaded processes on a CPU.

  The processes are spawned: a script that calls this needs `if __name__ == "__main__":`.

  Args:
    processes: by default one per core for many pictures, none for few. An accelerator renders in
      this process in any case.
    progress: a bar with rate and time left.

  Raises:
    DataError: a process died.
  """
  n = len(factors.class_id)
  if processes is None:
    processes = len(os.sched_getaffinity(0)) if n >= _FEW else 1
  # In the order of the classes, so that a process compiles few of them.
  rows = np.argsort(factors.class_id, kind="stable")
  if processes == 1 or jax.default_backend() != "cpu":
    chunk = CHUNK if jax.default_backend() == "cpu" else 16 * CHUNK
    shares = (rows[k : k + chunk] for k in range(0, n, chunk))
    parts = ((r, renderer.render(factors.take(r), resolution=resolution)) for r in shares)
  else:
    parts = _by_processes(factors, rows, resolution, processes)
  out = renderer.Rendered(
    np.empty((n, resolution, resolution, 3), np.uint8),
    np.empty((n, resolution, resolution), np.uint8),
    np.empty((n, 4), np.float32),
  )
  with tqdm(total=n, desc="rendering", unit=" images", disable=not progress) as bar:
    for done, pictures in parts:
      for column, part in zip(out, pictures, strict=True):
        column[done] = part
      bar.update(len(done))
  return out
