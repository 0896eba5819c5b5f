"""ImageReward: what people would say of a picture for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError
from cc_jax.metrics.model_folder import folder_hash, named_in_errors, read_json, weight_shapes
from cc_jax.metrics.preprocessing import CLIP_STATISTICS, Preprocessing, check_picture
from cc_jax.metrics.scorer import Scorer, vit_name
from cc_jax.models.blip import BlipTextConfig, BlipVisionConfig
from cc_jax.models.image_reward import MEAN, STD, TOKENS, ImageReward, ImageRewardConfig
from cc_jax.models.rngs import abstract

_LAYOUT = (
  "give a folder with med_config.json and model.safetensors of THUDM/ImageReward, and vocab.txt of "
  "bert-base-uncased"
)


class ImageRewardScorer(Scorer):
  """`reward` is standardised; `image_features` is the image encoder's CLS, of any length."""

  kind = "imagereward"
  features_are_unit = False

  @classmethod
  def load(
    cls, folder: Path, *, batch_size: int = 32, mesh: Mesh | None = None
  ) -> ImageRewardScorer:
    """Reads ImageReward's weights.

    Raises:
      UserError: of another model, incomplete, or with tensors that are missing or left over.
    """
    _check_layout(folder)
    with named_in_errors(folder):
      vision = BlipVisionConfig.from_shapes(weight_shapes(folder), "blip.visual_encoder.")
      text = BlipTextConfig.from_dict(read_json(folder / "med_config.json"))
      tokenizer = _tokenizer(folder / "vocab.txt", text.vocab_size)
      config = ImageRewardConfig(vision, text)
      module = load_weights(abstract(lambda rngs: ImageReward(config, rngs=rngs)), folder)
    preprocessing = Preprocessing(
      vision.image_size, vision.image_size, **CLIP_STATISTICS, crop="round", alpha="drop_last")
    scorer = cls(module, folder, folder_hash(folder), batch_size=batch_size, mesh=mesh,
                 preprocessing=preprocessing)  # fmt: skip
    scorer.config, scorer.tokenizer = config, tokenizer
    return scorer

  def reward(self, prompts: Sequence[str], pictures: Sequence[Any]) -> Float[np.ndarray, " n"]:
    if len(prompts) != len(pictures) or not len(prompts):
      raise UserError(f"{len(prompts)} prompts and {len(pictures)} pictures; give one for each")
    for index, picture in enumerate(pictures):
      check_picture(picture, index)
    ids, mask = self.token_ids(prompts)
    chunks = self.batched.chunks(pictures, ids, mask)
    return self.batched(_reward, ((self.prepare(part), *text) for part, *text in chunks))

  def token_ids(
    self, prompts: Sequence[str]
  ) -> tuple[Int[np.ndarray, "n t"], Int[np.ndarray, "n t"]]:
    """Ids, padded to 35, and 1 where there is a token; see `check_prompts`."""
    self.check_prompts(prompts)
    padded = self.tokenizer(list(prompts), padding="max_length", max_length=TOKENS)
    return tuple(np.asarray(padded[key], np.int32) for key in ("input_ids", "attention_mask"))

  def check_prompts(self, prompts: Sequence[str]) -> None:
    """The reference cuts a longer prompt off without a word, and scores what is left."""
    for prompt in prompts:
      count = len(self.tokenizer(prompt)["input_ids"])
      if count > TOKENS:
        raise UserError(
          f"the prompt {prompt!r} has {count} tokens; ImageReward reads {TOKENS}: shorten it"
        )

  def _what(self) -> str:
    return (
      f"ImageReward, BLIP {vit_name(self.config.vision)} and BERT ({self.name}), (x - {MEAN:.4f}) "
      f"/ {STD:.4f}; prompt as it is, up to {TOKENS} tokens; {self.preprocessing.describe()}"
    )

  _image_network = staticmethod(lambda module, pixels: module.image_features(pixels))


def _reward(module: ImageReward, pixels: Any, ids: Any, mask: Any) -> Any:
  return module(pixels, ids, mask)


def _check_layout(folder: Path) -> None:
  if not (folder / "med_config.json").is_file():
    found = "no med_config.json"
    if (folder / "config.json").is_file():
      values = read_json(folder / "config.json")
      found = (values.get("architectures") or [values.get("model_type")])[0] or found
    raise UserError(f"{folder} holds {found}; the scorer 'imagereward' reads another: {_LAYOUT}")
  if not list(folder.glob("*.safetensors")) and (folder / "ImageReward.pt").is_file():
    raise UserError(
      f"{folder / 'ImageReward.pt'} is a pickle, which can run code; convert it where PyTorch is: "
      "safetensors.torch.save_file({k: v.clone() for k, v in torch.load('ImageReward.pt', "
      "weights_only=True).items()}, 'model.safetensors')"
    )
  if not (folder / "vocab.txt").is_file():
    raise UserError(f"{folder / 'vocab.txt'} is missing; {_LAYOUT}")


def _tokenizer(file: Path, rows: int) -> Any:
  """BERT's, in lower case; the two tokens that BLIP adds are in no prompt."""
  from transformers import BertTokenizer

  words = file.read_text(encoding="utf-8").split("\n")
  words = words[:-1] if words[-1] == "" else words
  missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word not in words]
  if missing or len(words) > rows:
    raise UserError(
      f"{file} has {len(words)} words, without {missing}; the text encoder has {rows} rows: take "
      "vocab.txt of bert-base-uncased"
    )
  return BertTokenizer(vocab={word: index for index, word in enumerate(words)})
