"""`--mask=auto`: masks of references that have none, by a network that the user names."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cc_jax.errors import UserError
from data_pipeline.errors import DataError
from data_pipeline.images import OPAQUE, read_image
from data_pipeline.segment import Segmenter
from data_pipeline.triples import split_alpha

AUTO = "auto"  # in a mask's place; a file of that name is ./auto


def fill_masks(
  references: Sequence[Sequence[Any]], masks: Sequence[Sequence[Any]], segmenter: str | None
) -> list[list[Any]]:
  """The masks of each subject's references, arrays in place of the word 'auto'.

  Args:
    references: of each subject what `data_pipeline.images.read_image` takes.
    masks: one for each reference, or an empty list; see `AUTO`.
    segmenter: an .onnx file, see `data_pipeline.segment.Segmenter`.

  Raises UserError: no segmenter is named, or one without 'auto'; it cannot be used; it finds no
  subject in a reference.
  """
  wanted = any(_is_auto(mask) for cut in masks for mask in cut)
  if wanted and not segmenter:
    raise UserError("--mask=auto needs a network that finds subjects: --segmenter=FILE.onnx, for "
                    "example u2netp.onnx or an ISNet (docs/prepare.md says where they are)")
  if segmenter and not wanted:
    raise UserError(f"--segmenter={segmenter} has nothing to cut out; give a --reference "
                    "and --mask=auto")
  if not wanted:
    return [list(cut) for cut in masks]
  try:
    network = Segmenter(segmenter)
    return [[auto_mask(picture, network) if _is_auto(mask) else mask
             for picture, mask in zip(shown, cut)] for shown, cut in zip(references, masks)]
  except DataError as error:
    raise UserError(str(error)) from error


def auto_mask(reference: Any, segmenter: Segmenter) -> UInt8[np.ndarray, "h w"] | None:
  """The mask that the network finds, 255 = subject; None where an alpha channel says it already.

  Raises UserError where it finds no subject, DataError where the reference cannot be read.
  """
  pixels, alpha = split_alpha(read_image(reference))
  if alpha is not None:
    return None
  mask = segmenter(pixels)
  if mask.max() < OPAQUE:
    name = reference if isinstance(reference, str) else "the reference"
    raise UserError(f"{segmenter.file} finds no subject in {name} (the largest value of its mask "
                    f"is {mask.max()} of 255); give a --mask that is white on the subject")
  return mask


def _is_auto(mask: Any) -> bool:
  return isinstance(mask, str) and mask == AUTO
