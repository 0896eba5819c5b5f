"""Models' pictures, by processes that render side by side.

Never by the process that writes records: tensorflow 2.21 and Mesa 22.3's llvmpipe bring an LLVM
each, and a process with both dies of a segmentation fault.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.objects import mesh, renderer, scene
from data_pipeline.objects.catalogue import Model

_LEAST_COVER = 0.002  # of the frame; below, a view shows nothing


@dataclasses.dataclass(frozen=True)
class Rendered:
  """All views of a model; or, where it cannot be used, the reason."""

  model: Model
  frames: tuple[bytes, ...] = ()  # PNG
  masks: tuple[bytes, ...] = ()
  captions: tuple[str, ...] = ()
  scenes: tuple[str, ...] = ()
  pose: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # float32 [views, ...]
  reason: str = ""


def render_model(model: Model, *, views: int, size: int, seed: int) -> Rendered:
  """Renders a model; what is wrong with it stands in `reason`."""
  try:
    parts = mesh.load(model, size)
    drawn = scene.draw_views(seed, model.key, model.noun, views)
    pictures = list(_renderer(size).render(parts, drawn))
    for n, picture in enumerate(pictures):
      if picture.mask.mean() < 255 * _LEAST_COVER:
        raise DataError(f"cannot be seen in view {n}")
  except DataError as error:
    return Rendered(model, reason=str(error))
  return Rendered(
    model,
    tuple(png(picture.image) for picture in pictures),
    tuple(png(picture.mask) for picture in pictures),
    tuple(view.caption for view in drawn), tuple(view.scene for view in drawn),
    dict(
      world_to_camera=np.array([p.camera.world_to_camera for p in pictures], np.float32),
      intrinsics=np.array([p.camera.intrinsics for p in pictures], np.float32),
      azimuth=np.array([view.azimuth for view in drawn], np.float32),
      elevation=np.array([view.elevation for view in drawn], np.float32),
    ),
  )  # fmt: skip


def render_views(
  model: Model, views: list[scene.View], size: int, *, white: bool = False
) -> list[renderer.Picture]:
  """Pictures of a model in views of one's own choice; `white`: the subject alone, on white."""
  return list(_renderer(size).render(mesh.load(model, size), views, white=white))


def render_models(
  models: Iterable[Model], workers: int, **options: int
) -> Iterator[Rendered]:
  """`render_model` of each, in their order, by so many processes.

  Raises DataError where there is no renderer, or when a process dies.
  """
  work = functools.partial(render_model, **options)
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent
  )
  processes: list = []
  try:
    pool.submit(check_renderer, options["size"]).result()  # before models are read
    processes = list(pool._processes.values())
    waiting: collections.deque = collections.deque()
    for model in models:
      waiting.append(pool.submit(work, model))
      if len(waiting) >= 4 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  except concurrent.futures.process.BrokenProcessPool:
    codes = sorted({p.exitcode for p in processes} - {0, None}) or "unknown"
    raise DataError(
      f"a rendering process died (exit code {codes}; too little memory?); run it again, with fewer "
      "--workers: it goes on where it stopped"
    ) from None
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def check_drawing(size: int, seed: int, views: int = 2, workers: int = 1) -> None:
  """Raises DataError for a size of pictures, a seed, or numbers of these that cannot be."""
  if workers < 1:
    raise DataError(f"--workers={workers} must be 1 or more")
  if views < 2:
    raise DataError(f"--views={views}: a triple needs 2 or more views of a subject")
  if not 16 <= size <= 4096:
    raise DataError(f"--size={size} must lie between 16 and 4096 pixels")
  if seed < 0:
    raise DataError(f"--seed={seed} must be 0 or more")


def check_renderer(size: int) -> None:
  """Raises DataError where pictures cannot be rendered: before work is spent."""
  try:
    import trimesh  # noqa: F401
  except ImportError:
    raise DataError("trimesh is not installed; pip install moderngl trimesh") from None
  _renderer(size)


def png(image: np.ndarray) -> bytes:
  """uint8 [h, w] or [h, w, 3] as PNG."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, "png", compress_level=1)
  return out.getvalue()


@functools.cache
def _renderer(size: int) -> renderer.Renderer:
  return renderer.Renderer(size)


def _end_with_parent() -> None:
  """Ends this process when the one that started it is killed: it would wait for work for ever."""
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
