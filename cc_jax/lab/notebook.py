"""What the notebooks share: menus where ipywidgets is installed, example subjects, a figure."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cc_jax.sampling.images import grid, to_image


def choose(draw: Callable[..., Any], **choices: Sequence) -> Any:
  """Calls `draw` with values from a menu for each of `choices`, again at every change.

  Without ipywidgets (`pip install -e '.[notebooks]'`): once, with the first of each.
  """
  choices = {name: list(dict.fromkeys(values)) for name, values in choices.items()}
  try:
    from ipywidgets import interact
  except ImportError:
    return draw(**{name: values[0] for name, values in choices.items()})
  interact(draw, **choices)
  return None


def example_subjects(folder: str | Path, count: int = 4, frames: int = 4) -> Path:
  """Writes rendered subjects in the layout of `data_pipeline.sources.folder`; returns the folder.

  They stand for photographs: PNGs whose alpha channel is the subject, and captions. An existing
  folder is left as it is.
  """
  from data_pipeline.subjects3d import captions, factors, renderer  # renders: not at import

  folder = Path(folder)
  if folder.exists():
    return folder
  rng = np.random.default_rng(0)
  table = factors.subjects("test").take(np.repeat(np.arange(count), frames))
  views = factors.sample_factors(rng, table, hat=0, style=0)
  rendered = renderer.render(views)
  for subject in range(count):
    noun = factors.CLASSES[table.class_id[subject * frames]]
    subfolder = folder / f"{noun.replace(' ', '_')}_{subject + 1}"
    subfolder.mkdir(parents=True)
    content = dict(class_noun=noun, captions={})
    for frame in range(frames):
      row, name = subject * frames + frame, f"{frame + 1}.png"
      picture = np.dstack([rendered.image[row], rendered.mask[row]])
      Image.fromarray(picture).save(subfolder / name)
      content["captions"][name] = captions.caption(rng, views.take(row), mention=("scene",)).text
    (subfolder / "captions.json").write_text(json.dumps(content, indent=2))
  return folder


def folder_sheet(folder: str | Path, *, subjects: int = 6, frames: int = 6) -> Image.Image:
  """The pictures of a folder of subjects as training sees them, a subject per row.

  Raises:
    DataError: the folder cannot be trained on; the message says what to change.
  """
  from data_pipeline.sources.folder import read_folder  # brings tensorflow

  shown = read_folder(Path(folder))[:subjects]
  columns = min(frames, max(len(subject.frames) for subject in shown))
  cells, captions = [], []
  for subject in shown:
    for frame in subject.frames[:columns]:
      cells.append(to_image(np.dstack(frame.load())).resize((96, 96)))
      captions.append(frame.caption)
    empty = columns - len(subject.frames[:columns])
    cells += [None] * empty
    captions += [""] * empty
  return grid(cells, captions, columns=columns, row_headings=[s.noun for s in shown])


def memory_bars(works: Mapping[str, Any], limit: float) -> Figure:
  """The memory in use on one chip between two steps, a bar for each layout, a line at `limit`.

  Args:
    works: label -> `cc_jax.plan.lower.AbstractProgram`.
    limit: a chip's memory in bytes.
  """
  from cc_jax.plan.estimate import chip_bytes

  figure = Figure(figsize=(2.5 + len(works), 3.6))
  axes, bottom = figure.subplots(), np.zeros(len(works))
  for name in next(iter(works.values())).parts:
    heights = np.asarray([chip_bytes(work.parts[name]) for work in works.values()]) / 2**30
    axes.bar(range(len(works)), heights, 0.6, bottom=bottom, label=name)
    bottom += heights
  if np.isfinite(limit):
    axes.axhline(limit / 2**30, color="black")
  axes.set_xticks(range(len(works)), list(works))
  axes.set(ylabel="GiB on each chip", title="Between two steps; activations come on top")
  axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
  return figure
