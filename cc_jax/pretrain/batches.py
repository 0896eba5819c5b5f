"""Batches of the rendered world for pretraining: token ids, pixels, subjects cut out on white."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cc_jax.bases import tokenizer as tokenizer_lib
from data_pipeline.subjects3d.captions import CUTOUT_MENTION_PROBS, MENTION_PROBS, write_captions
from data_pipeline.subjects3d.prerender import Pictures
from data_pipeline.triples import TripleConfig, show_reference


def train_tokenizer(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """A byte-pair vocabulary in CLIP's format, from the captions of the world."""
  rng = np.random.default_rng(config.seed)
  factors = pictures.factors.take(slice(20_000))
  texts = write_captions(rng, factors, dict.fromkeys(MENTION_PROBS, 0.7))
  tokenizer_lib.train_tokenizer(
      texts, workdir / "base" / "tokenizer", config.tokenizer.vocab_size,
      config.tokenizer.max_length)


def tokenize(tokenizer, texts: Sequence[str]) -> np.ndarray:
  """int32 [n, T] token ids, padded to the tokenizer's limit."""
  encoded = tokenizer(list(texts), padding="max_length", truncation=True,
                      max_length=tokenizer.model_max_length)
  return np.asarray(encoded["input_ids"], np.int32)


def tokenize_captions(
    tokenizer, pictures: Pictures, count: int, seed: int, *, cut_out: bool = False
) -> np.ndarray:
  """Token ids int32 [count, n, T]: `count` phrasings of every picture, or of its cut-out."""
  rng = np.random.default_rng([seed, 1])
  mentions = CUTOUT_MENTION_PROBS if cut_out else MENTION_PROBS
  return np.stack([
      tokenize(tokenizer, write_captions(rng, pictures.factors, mentions)) for _ in range(count)])


def cut_outs(images: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Subjects cut out of uint8 [n,h,w,3] by masks [n,h,w] and put on white as positives are.

  Random size and position: the encoder will see references that fill the canvas, and pictures with
  subjects of the usual size teach it little of those.
  """
  config = TripleConfig(image_size=images.shape[1], reference_layout="random")
  draws = rng.random((len(images), 3))
  shown = [show_reference(*row, config, u) for *row, u in zip(images, masks, draws)]
  return np.array(shown, np.uint8).reshape(images.shape)


def to_unit(images: jax.Array) -> jax.Array:
  """uint8 -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1
