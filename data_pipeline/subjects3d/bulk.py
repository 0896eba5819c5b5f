"""Bulk rendering by single-threaded processes, which use the cores better than threads of one."""

import contextlib
import multiprocessing
import os
import queue

import jax
import numpy as np
from tqdm import tqdm

from data_pipeline.cores import available_cores
from data_pipeline.errors import DataError
from data_pipeline.subjects3d import renderer
from data_pipeline.subjects3d.factors import Factors

CHUNK = 256  # pictures between two steps of the progress bar
_MIN_FOR_PROCESSES = 4000  # pictures; for fewer, starting processes costs more than it saves
_WORKER_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  "NPROC": "1",
  "PJRT_NPROC": "1",
  "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def _environment(values: dict[str, str]):
  """Sets variables while workers start: a spawned process inherits them before it imports JAX."""
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
  """Target of a process: renders `factors` by chunks; `rows` are their rows in the whole table."""
  for start in range(0, len(rows), CHUNK):
    chunk = slice(start, start + CHUNK)
    pictures = renderer.render(factors.take(chunk), resolution=resolution)
    results.put((rows[chunk], tuple(pictures)))


def _by_processes(factors: Factors, rows, resolution: int, processes: int):
  """Yields (rows, pictures) in any order. Each process gets a contiguous part of `rows`."""
  context = multiprocessing.get_context("spawn")
  results = context.Queue(maxsize=4 * processes)
  workers = []
  try:
    with _environment(_WORKER_ENVIRONMENT):
      for part in np.array_split(rows, processes):
        args = (part, factors.take(part), resolution, results)
        worker = context.Process(target=_work, args=args, daemon=True)
        worker.start()
        workers.append(worker)  # after the start: only running processes can be terminated
    num_missing = len(rows)
    while num_missing:
      try:
        rendered_rows, pictures = results.get(timeout=2)
      except queue.Empty:
        if any(w.exitcode not in (None, 0) for w in workers):
          raise DataError(
            "a rendering process died (its message is above; too little memory?): use processes=1"
          ) from None
        continue
      num_missing -= len(rendered_rows)
      yield rendered_rows, pictures
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
    processes = available_cores() if n >= _MIN_FOR_PROCESSES else 1
  # Sorted by class, so that a process compiles the programs of few classes.
  rows = np.argsort(factors.class_id, kind="stable")
  if processes == 1 or jax.default_backend() != "cpu":
    chunk = CHUNK if jax.default_backend() == "cpu" else 16 * CHUNK
    chunks = (rows[k : k + chunk] for k in range(0, n, chunk))
    parts = ((r, renderer.render(factors.take(r), resolution=resolution)) for r in chunks)
  else:
    parts = _by_processes(factors, rows, resolution, processes)
  out = renderer.Rendered(
    np.empty((n, resolution, resolution, 3), np.uint8),
    np.empty((n, resolution, resolution), np.uint8), np.empty((n, 4), np.float32),
  )
  with tqdm(total=n, desc="rendering", unit=" images", disable=not progress) as bar:
    for rendered_rows, pictures in parts:
      for column, values in zip(out, pictures, strict=True):
        column[rendered_rows] = values
      bar.update(len(rendered_rows))
  return out
