"""LPIPS: how different two pictures of one size look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError
from cc_jax.metrics.model_folder import Expected, folder_hash, named_in_errors, read_config
from cc_jax.metrics.preprocessing import on_white, to_pil
from cc_jax.metrics.scorer import Scorer
from cc_jax.models.lpips import Lpips, LpipsConfig
from cc_jax.models.rngs import abstract

EXPECTED = Expected(
  "lpips", ("LPIPS",), ("lpips",),
  "the folder that `python -m cc_jax.bases.from_package lpips-alexnet` writes",
)  # fmt: skip


class LpipsScorer(Scorer):
  """`pair_scores` at the pictures' own size; a program is compiled for each size."""

  kind = "lpips"
  features_are_unit = False

  @classmethod
  def load(cls, folder: Path, *, batch_size: int = 32, mesh: Mesh | None = None) -> LpipsScorer:
    """Reads the state_dict of lpips.LPIPS(net='alex' or 'vgg').

    Raises:
      UserError: of another model, incomplete, or with tensors that are missing or left over.
    """
    values = read_config(folder, EXPECTED)
    with named_in_errors(folder):
      config = LpipsConfig.from_dict(values)
      module = load_weights(abstract(lambda rngs: Lpips(config, rngs=rngs)), folder)
    scorer = cls(module, folder, folder_hash(folder), batch_size=batch_size, mesh=mesh)
    scorer.config = config
    return scorer

  def prepare(self, pictures: Sequence[Any]) -> Float[np.ndarray, "n h w 3"]:
    """Pictures of one size in [-1, 1]; neither resized nor cropped."""
    pixels = [np.asarray(on_white(to_pil(p, i))) for i, p in enumerate(pictures)]
    return np.stack(pixels).astype(np.float32) / np.float32(127.5) - np.float32(1)

  def pair_scores(self, a: Sequence[Any], b: Sequence[Any]) -> Float[np.ndarray, " n"]:
    if len(a) != len(b) or not len(a):
      raise UserError(f"{len(a)} and {len(b)} pictures; LPIPS compares pairs: give one for each")
    sizes = [self._size(pair, index) for index, pair in enumerate(zip(a, b, strict=True))]
    scores = np.zeros(len(a), np.float32)
    for size in dict.fromkeys(sizes):
      places = [index for index, other in enumerate(sizes) if other == size]
      chunks = self.batched.chunks([a[i] for i in places], [b[i] for i in places])
      scores[places] = self.batched(_distance, (tuple(map(self.prepare, pair)) for pair in chunks))
    return scores

  def _size(self, pair: tuple[Any, Any], index: int) -> tuple[int, int]:
    sizes = [to_pil(picture, index).size for picture in pair]
    if sizes[0] != sizes[1]:
      raise UserError(
        f"pair {index}: pictures of {_words(sizes[0])} and {_words(sizes[1])} pixels; LPIPS "
        "compares pictures of one size: resize one of them"
      )
    if min(sizes[0]) < self.config.smallest:
      raise UserError(
        f"pair {index}: {_words(sizes[0])} pixels; LPIPS needs {self.config.smallest} a side"
      )
    return sizes[0]

  def _what(self) -> str:
    tower = {"alex": "AlexNet", "vgg": "VGG16"}[self.config.net]
    return (
      f"LPIPS v0.1 {tower} ({self.name}), mean over pixels, 0 = equal; pictures at their "
      "own size, alpha laid on white, in [-1, 1]"
    )


def _distance(module: Lpips, a: Any, b: Any) -> Any:
  return module(a, b)


def _words(size: tuple[int, int]) -> str:
  return f"{size[0]} x {size[1]}"
