"""What every scorer has: a network, how pictures are prepared for it, and a name in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from cc_jax.errors import UserError
from cc_jax.metrics.batches import Batched
from cc_jax.metrics.masked import BACKGROUNDS, cut_out
from cc_jax.metrics.preprocessing import Preprocessing, check_picture

_SIZES = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H",
          (1664, 48): "bigG"}  # fmt: skip
_METHODS = {
  "image_features": "clip, dino, dinov2, dinov3 or imagereward",
  "text_features": "clip",
  "pair_scores": "lpips",
  "reward": "imagereward",
}


class Scorer:
  """A network that scores pictures; `load_scorer` makes one from a folder.

  Pictures are uint8 arrays [h, w], [h, w, 3] or [h, w, 4], or PIL images, of any sizes; what
  becomes of transparency is the reference's choice (`describe`). Everything is float32 on the
  device, in batches of one shape. What a kind of scorer has no answer to is a UserError.
  """

  kind: ClassVar[str]
  features_are_unit: ClassVar[bool] = True  # rows of `image_features` have length 1

  def __init__(
    self, module: nnx.Module, folder: Path, sha256: str, *, batch_size: int, mesh: Mesh | None,
    preprocessing: Preprocessing | None = None,
  ):
    self.folder = folder
    self.name = folder.name  # in `describe`; load_scorer puts a hub id here
    self.sha256 = sha256  # of the weights file, 64 hex digits; see model_folder.checkpoint_hash
    self.preprocessing = preprocessing
    self.batched = Batched(module, batch_size, mesh)

  def prepare(self, pictures: Sequence[Any]) -> Float[np.ndarray, "n s s 3"]:
    """What the network sees: the reference's preprocessing, to the pixel."""
    if self.preprocessing is None:
      raise self._has_no("prepare")
    return self.preprocessing(pictures)

  def image_features(
    self, pictures: Sequence[Any], *, masks: Sequence[Any] | None = None,
    background: str = "white", raw: bool = False,
  ) -> Float[np.ndarray, "n d"]:
    """A row for each picture; of length 1 if `features_are_unit`, so that products are cosines.

    Args:
      masks: uint8 [h, w] of each picture, 255 = subject: the rest is laid over with `background`
        before anything else is done ('white', or 'grey': 128).
      raw: never of length 1 but as the network says it: for Fréchet distances.
    """
    network = self._image_network
    if network is None:
      raise self._has_no("image_features")
    if not len(pictures):
      raise UserError("there are no pictures to score; give one or more")
    for index, picture in enumerate(pictures):
      check_picture(picture, index)
    pictures = pictures if masks is None else cut_out(pictures, masks, background)
    batches = ((self.prepare(part),) for (part,) in self.batched.chunks(pictures))
    features = self.batched(network, batches)
    return unit_rows(features) if self.features_are_unit and not raw else features

  def text_features(self, prompts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """A row of length 1 for each prompt, in the space of `image_features` (clip)."""
    raise self._has_no("text_features")

  def pair_scores(self, a: Sequence[Any], b: Sequence[Any]) -> Float[np.ndarray, " n"]:
    """The distance of a[i] and b[i], which have one size; 0 = the same picture (lpips)."""
    raise self._has_no("pair_scores")

  def reward(self, prompts: Sequence[str], pictures: Sequence[Any]) -> Float[np.ndarray, " n"]:
    """How well pictures[i] suits prompts[i] and pleases people, standardised (imagereward)."""
    raise self._has_no("reward")

  def check_prompts(self, prompts: Sequence[str]) -> None:
    """Raises UserError for a prompt that the network would not read whole; costs nothing."""

  def describe(self, *, masked: str | None = None) -> str:
    """One line that names the score in full: what else to know of two numbers to compare them.

    Args:
      masked: the background, if scores were taken with masks.
    """
    seen = "whole picture" if masked is None else f"subject alone on {BACKGROUNDS[masked][0]}"
    return f"{self._what()}; {seen}; sha256 {self.sha256}"

  _image_network: ClassVar[Any] = None  # (module, pixels) -> features, if there are any

  def _what(self) -> str:
    raise NotImplementedError

  def _has_no(self, method: str) -> UserError:
    instead = _METHODS.get(method, "another")
    return UserError(f"the scorer {self.kind!r} has no {method}; load one of the kind {instead}")


def vit_name(config: Any) -> str:
  """'ViT-B/32', as papers call them, of a config's width and patch; others by width and layers."""
  size = _SIZES.get((config.hidden_size, config.num_hidden_layers))
  size = size or f"{config.hidden_size}x{config.num_hidden_layers}"
  return f"ViT-{size}/{config.patch_size}"


def unit_rows(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Every row of length 1."""
  length = np.linalg.norm(features, axis=-1, keepdims=True)
  return features / np.maximum(length, np.finfo(np.float32).tiny)


def cosine(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
  """Cosines of all pairs of rows, float64, of features of any length."""
  a, b = (unit_rows(np.asarray(x, np.float64)) for x in (a, b))
  return a @ b.T

