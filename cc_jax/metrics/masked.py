"""Pictures of the subject alone, for scores that shall not see the background."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cc_jax.errors import UserError
from cc_jax.metrics.preprocessing import on_white, to_pil

# name -> in words, level of all three channels
BACKGROUNDS = {"white": ("white (255)", 255), "grey": ("grey (128)", 128)}


def cut_out(
  pictures: Sequence[Any], masks: Sequence[Any], background: str = "white"
) -> list[UInt8[np.ndarray, "h w 3"]]:
  """Each picture with all but its subject laid over; size and place of the subject stay.

  Args:
    masks: uint8 [h, w], 255 = subject; values between blend (soft edges).
    background: of BACKGROUNDS.

  Raises:
    UserError: another background, another number of masks, or a mask of another size than its
      picture or without a subject; it is named by its place, from 0.
  """
  if background not in BACKGROUNDS:
    raise UserError(f"background is {background!r}; use one of {', '.join(BACKGROUNDS)}")
  if len(pictures) != len(masks):
    raise UserError(f"{len(pictures)} pictures, but {len(masks)} masks; give one for each")
  level = BACKGROUNDS[background][1]
  result = []
  for index, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
    pixels = np.asarray(on_white(to_pil(picture, index)))
    mask = np.asarray(mask)
    if mask.dtype != np.uint8 or mask.shape != pixels.shape[:2]:
      raise UserError(
        f"mask {index} is {mask.dtype} {mask.shape}; its picture needs uint8 {pixels.shape[:2]}"
      )
    if not mask.any():
      raise UserError(f"mask {index} has no subject (all 0); leave the picture out")
    share = mask[..., None].astype(np.float64) / 255
    result.append(np.rint(pixels * share + level * (1 - share)).astype(np.uint8))
  return result
