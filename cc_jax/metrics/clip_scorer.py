"""CLIP-I and CLIP-T: cosines of CLIP's projected embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError
from cc_jax.metrics.model_folder import (
  Expected,
  folder_hash,
  named_in_errors,
  read_config,
  read_json,
)
from cc_jax.metrics.preprocessing import CLIP_STATISTICS, Preprocessing
from cc_jax.metrics.scorer import Scorer, unit_rows, vit_name
from cc_jax.models.clip import CLIPConfig, CLIPModel
from cc_jax.models.clip_pixels import processor_from_dict
from cc_jax.models.rngs import abstract

EXPECTED = Expected("clip", ("CLIPModel",), ("clip",), "openai/clip-vit-base-patch32")


class ClipScorer(Scorer):
  """`image_features` and `text_features` are unit vectors; CLIP-I and CLIP-T are their products."""

  kind = "clip"

  @classmethod
  def load(
    cls, folder: Path, *, batch_size: int = 32, mesh: Mesh | None = None, text_prefix: str = ""
  ) -> ClipScorer:
    """Reads a folder of transformers' CLIPModel with its tokenizer.

    Raises:
      UserError: of another model, incomplete, or with tensors that are missing or left over.
    """
    values = read_config(folder, EXPECTED)
    with named_in_errors(folder):
      config = CLIPConfig.from_dict(values)
      preprocessing = _preprocessing(folder, config)
      tokenizer = load_tokenizer(folder)
      module = load_weights(abstract(lambda rngs: CLIPModel(config, rngs=rngs)), folder)
    scorer = cls(module, folder, folder_hash(folder), batch_size=batch_size, mesh=mesh,
                 preprocessing=preprocessing)  # fmt: skip
    scorer.config, scorer.tokenizer, scorer.text_prefix = config, tokenizer, text_prefix
    return scorer

  def text_features(self, prompts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    if not len(prompts):
      raise UserError("there are no prompts to score; give one or more")
    ids = self.token_ids(prompts)
    return unit_rows(self.batched(_text_network, self.batched.chunks(ids)))

  def token_ids(self, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
    """Prefix and prompt as the tokenizer pads them; see `check_prompts`."""
    self.check_prompts(prompts)
    texts = [self.text_prefix + prompt for prompt in prompts]
    padded = self.tokenizer(texts, padding="max_length", max_length=self._limit)
    return np.asarray(padded["input_ids"], np.int32)

  def check_prompts(self, prompts: Sequence[str]) -> None:
    for prompt in prompts:
      count = len(self.tokenizer(self.text_prefix + prompt)["input_ids"])
      if count > self._limit:
        raise UserError(
          f"the prompt {prompt!r} has {count} tokens; {self.folder} reads {self._limit}: shorten it"
        )

  @property
  def _limit(self) -> int:
    return min(self.config.text.max_position_embeddings, self.tokenizer.model_max_length)

  def _what(self) -> str:
    vision = self.config.vision
    return (
      f"CLIP {vit_name(vision)} ({self.name}), projected to {vision.projection_dim}, cosine times "
      f"1; text prefix {self.text_prefix!r}; {self.preprocessing.describe()}"
    )

  _image_network = staticmethod(lambda module, pixels: module.image_features(pixels))


def _text_network(module: CLIPModel, ids: Any) -> Any:
  return module.text_features(ids)


def _preprocessing(folder: Path, config: CLIPConfig) -> Preprocessing:
  """preprocessor_config.json; without it CLIP's own: shorter side bicubic, centre crop."""
  values = {**CLIP_STATISTICS, "size": config.vision.image_size}
  file = folder / "preprocessor_config.json"
  processor = processor_from_dict(read_json(file) if file.is_file() else {}, values)
  return Preprocessing(
    size=processor["size"], shortest_edge=processor["shortest_edge"], mean=processor["mean"],
    std=processor["std"], method=processor["method"],
  )
