"""Copies of pictures: re-encoded, resized, or the next frame of a film that stands still."""

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

HASH_BYTES, THUMB_BYTES = 32, 192
_BANDS = 8  # hashes that differ in 7 bits or less agree in one of so many pieces
_WINDOW = 64  # how many that agree in a piece are compared with one of them
# The largest difference of the small pictures. Compression makes 3; a recoloured twin, and a small
# subject that has moved before a flat background, differ by more.
_COLOR_LEVELS = 10


def picture_hash(picture: UInt8[np.ndarray, "h w 3"]) -> tuple[bytes, bytes]:
  """Its difference hash, 16 x 16 bits, and it at 8 x 8 pixels, which has the colours.

  The hash: https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html
  """
  image = Image.fromarray(picture)
  image = image.reduce(max(1, min(image.size) // 256))  # twice as fast, hashes agree
  grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
  small = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
  return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), small.tobytes()


def find_copies(
  hashes: UInt8[np.ndarray, "n 32"], thumbs: UInt8[np.ndarray, "n 192"],
  places: tuple[Int[np.ndarray, " n"], Int[np.ndarray, "n k"], Int[np.ndarray, "n m"]], bits: int,
) -> Int[np.ndarray, " n"]:
  """For every picture the earlier one that it is a copy of, -1 where there is none.

  `places`: of each picture its subject, its file, and what of the file is shown (mask and box), as
  numbers. One file with two masks or boxes shows two things, which are no copies; nor is what a
  subject lists twice, on purpose. `bits`: how many of 256 may differ, at most 7. A picture that is
  left out as a copy has no copies of its own. Among pictures that agree in 32 bits (flat ones do)
  only the nearest 64 are compared.
  """
  arrays = hashes, thumbs, *places
  pairs = {pair for band in range(_BANDS) for pair in _pairs(arrays, band, bits)}
  copy_of = np.full(len(hashes), -1)
  for later, earlier in sorted(pairs):
    if copy_of[later] < 0 and copy_of[earlier] < 0:
      copy_of[later] = earlier
  return copy_of


def _pairs(arrays: tuple[np.ndarray, ...], band: int, bits: int) -> list[tuple[int, int]]:
  """(later, earlier) of the pictures that agree in a piece of their hashes, and are copies."""
  piece = np.ascontiguousarray(arrays[0][:, 4 * band : 4 * band + 4]).view(np.uint32)[:, 0]
  order = np.argsort(piece, kind="stable")
  found = []
  for step in range(1, min(_WINDOW, len(order) - 1) + 1):
    same = np.flatnonzero(piece[order[step:]] == piece[order[:-step]])
    if not len(same):
      break
    later, earlier = order[same + step], order[same]
    is_copy = _alike([array[later] for array in arrays], [array[earlier] for array in arrays], bits)
    found += zip(later[is_copy].tolist(), earlier[is_copy].tolist())
  return found


def _alike(one: list[np.ndarray], other: list[np.ndarray], bits: int) -> Bool[np.ndarray, " n"]:
  (hash_a, thumb_a, *places_a), (hash_b, thumb_b, *places_b) = one, other
  differing = np.bitwise_count(hash_a ^ hash_b).sum(1)
  levels = np.abs(thumb_a.astype(np.int16) - thumb_b).max(1)
  same_subject, same_file, same_part = (
    (a == b).reshape(len(a), -1).all(1) for a, b in zip(places_a, places_b))
  on_purpose = same_file & (same_subject | ~same_part)
  return (differing <= bits) & (levels <= _COLOR_LEVELS) & ~on_purpose
