"""Prompts drawn of subjects of any data: what is drawn, and the labelled grid of what came out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cc_jax.errors import UserError
from cc_jax.sampling.images import grid

NOUN = "{noun}"  # in a template: where the subject's class noun goes


class ShownSubject(NamedTuple):
  """A subject as the adapter gets it, and what is said of it."""

  name: str
  reference: UInt8[np.ndarray, "s s 3"]
  class_noun: str
  caption: str  # of another picture of the subject; it has the noun in it


class PromptGrid(NamedTuple):
  """n = subjects * columns pictures to draw, subject by subject."""

  references: UInt8[np.ndarray, "n s s 3"]
  prompts: tuple[str, ...]
  nouns: tuple[str, ...]
  rows: tuple[str, ...]  # the subjects' names
  columns: tuple[str, ...]  # the templates; () = one column, every subject's own caption


def make_prompt_grid(subjects: Sequence[ShownSubject], templates: Sequence[str]) -> PromptGrid:
  """Every subject with every template, or with its own caption where there are no templates.

  Raises:
    UserError: a template that does not say where the noun goes; no subject.
  """
  for template in templates:
    if NOUN not in template:
      raise UserError(
        f"config.sample.prompts has {template!r}; write {NOUN} where the subject's class noun "
        f"goes, as in 'a {NOUN} on the beach'")
  if not subjects:
    raise UserError("the data have no subject with a picture that can be drawn from")
  prompts = [template.replace(NOUN, subject.class_noun)
             for subject in subjects for template in templates]
  columns = len(templates) or 1
  return PromptGrid(
    references=np.stack([s.reference for s in subjects]).repeat(columns, axis=0),
    prompts=tuple(prompts or [subject.caption for subject in subjects]),
    nouns=tuple(subject.class_noun for subject in subjects for _ in range(columns)),
    rows=tuple(subject.name for subject in subjects), columns=tuple(templates))


def draw_sheet(cells: PromptGrid, images: UInt8[np.ndarray, "n h w 3"]) -> Image.Image:
  """A row for each subject: its reference, then what was drawn from it, a column per template."""
  columns = len(cells.columns) or 1
  pictures, captions = [], []
  for start in range(0, len(images), columns):
    pictures += [cells.references[start], *images[start : start + columns]]
    captions += ["", *([""] * columns if cells.columns else [cells.prompts[start]])]
  side = max(images.shape[1:3])
  return grid(
    pictures, captions, columns=1 + columns, row_headings=cells.rows,
    column_headings=["reference", *(cells.columns or ["its own caption"])],
    scale=1.5 if side < 128 else min(1.0, 512 / side))
