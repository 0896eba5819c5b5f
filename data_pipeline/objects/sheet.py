"""A contact sheet: subjects in rows, their views in columns, at the end a mask."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.objects import scene, worker
from data_pipeline.objects.catalogue import Model


def contact_sheet(
  models: Sequence[Model], *, views: int = 8, size: int = 128, seed: int = 0
) -> Image.Image:
  """`views` evenly chosen of 24 views of each model, and the last one's mask."""
  rows = []
  for model in models:
    drawn = scene.draw_views(seed, model.key, model.noun, 24)[:: max(24 // views, 1)][:views]
    pictures = worker.render_views(model, drawn, size)
    mask = np.repeat(pictures[-1].mask[..., None], 3, 2)
    rows.append(np.concatenate([*(picture.image for picture in pictures), mask], 1))
  return Image.fromarray(np.concatenate(rows))


def check_file(file: str | Path) -> None:
  """Raises DataError for a file that `save` cannot write, before work is spent."""
  path = Path(file).expanduser()
  if path.suffix.lower() != ".png":
    raise DataError(f"--sheet={file} is written as PNG; let it end in .png")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("ab"):  # leaves what is there as it is
      pass
    if is_new:
      path.unlink()
  except OSError as error:
    raise DataError(f"--sheet={file} cannot be written ({error.strerror or error})") from None


def save(image: Image.Image, file: str | Path, colors: int | None = None) -> None:
  """Writes a PNG; with `colors` in so many of them, which makes it small."""
  file = Path(file).expanduser()
  file.parent.mkdir(parents=True, exist_ok=True)
  if colors:
    image = image.quantize(colors, kmeans=3)  # small subjects keep a colour of their own
  image.save(file, optimize=True)
