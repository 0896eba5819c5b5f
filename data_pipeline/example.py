"""From three frames of a subject and a caption to a row of a batch, the same for all sources."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipeline import sampling, tokens, triples
from data_pipeline.errors import DataError
from data_pipeline.feature_cache import FeatureCache
from data_pipeline.words import with_article

PICTURES = dict.fromkeys(("positive", "reference", "target", "target_mask"), np.uint8)


def signature(text_encoders: int = 1, pictures: Mapping[str, type] = PICTURES) -> dict[str, type]:
  """The keys and types of an example; for the shapes see `data_pipeline.make_loader`.

  `pictures`: of the pictures, or of what is stored of them (`feature_cache.FeatureCache.dtypes`).
  """
  prompts = sum(tokens.prompt_keys(text_encoders), ())
  labels = ("subject_id", "family_id", "class_id")
  return {**pictures, **dict.fromkeys(prompts + labels, np.int32)}


class Maker:
  """Makes rows of the global batch. A row's random numbers depend on (seed, step, row) alone."""

  def __init__(
    self, data_config, tokenizers: Sequence[Callable], *, batch_size: int, seed: int, s_words: int
  ):
    """`tokenizers`: one for each text encoder."""
    self._text_encoders = len(tokenizers)
    self.signature = signature(self._text_encoders)
    self.triple = triples.TripleConfig.from_config(data_config)
    self.frames_kind = data_config.frames
    sampling.check_frames(self.frames_kind)
    self.holdout = sampling.check_holdout(data_config.holdout_subjects)
    self.max_bad_share = sampling.check_bad_share(data_config.max_bad_share)
    self.cache: FeatureCache | None = None
    self.decoder = getattr(data_config, "decoder", "auto")  # configs of before lack it
    self._terse_prob = data_config.caption_drop_detail_prob
    if not 0 <= self._terse_prob <= 1:
      raise DataError(f"data.caption_drop_detail_prob={self._terse_prob} must lie between 0 and 1")
    self._group, self._group_ratio = data_config.group, data_config.group_ratio
    self._batch_size, self._seed = batch_size, seed
    keys = tokens.prompt_keys(len(tokenizers))
    labels = dict.fromkeys(("subject_id", "family_id", "class_id"), ())
    for names, tokenizer in zip(keys, tokenizers):
      labels |= zip(names, ((tokenizer.model_max_length,), (), (2,)))
    self.label_shapes: dict[str, tuple[int, ...]] = labels  # of a row's integers

    def encode(caption: str, noun: str) -> dict[str, np.ndarray]:
      """The row's `prompt_keys`. Raises DataError for a caption without the noun or too long."""
      encoded = {}
      for names, tokenizer in zip(keys, tokenizers):
        encoded |= zip(names, tokens.encode_prompt(tokenizer, caption, noun, s_words))
      return encoded

    # A finite data set repeats its captions; the limit is for rendered ones, which are endless.
    self.encode = functools.lru_cache(maxsize=1 << 15)(encode)
    self._chosen_by_step: dict[int, np.ndarray] = {}

  def read_features(self, cache: FeatureCache) -> None:
    """From now on rows have the stored features of pictures, and not the pictures."""
    self.cache = cache
    self.signature = signature(self._text_encoders, cache.dtypes)

  def check(self, table: sampling.SubjectTable) -> None:
    """Raises DataError when the batches that the config asks for cannot be drawn from `table`."""
    sampling.check_group(table, self._group, self._group_ratio)

  def rng(self, step: int, row: int) -> np.random.Generator:
    return sampling.row_rng(self._seed, step, row)

  def spare_rng(self, step: int, row: int) -> np.random.Generator:
    return sampling.spare_rng(self._seed, step, row)

  def subjects(self, table: sampling.SubjectTable, step: int) -> np.ndarray:
    """Rows of `table`, one for each row of the global batch."""
    chosen = self._chosen_by_step.get(step)
    if chosen is None:
      chosen = sampling.choose_subjects(
          self._seed, step, table, self._batch_size,
          group=self._group, group_ratio=self._group_ratio,
      )  # fmt: skip
      # Threads work on the rows of a few successive steps.
      if len(self._chosen_by_step) >= 16:
        self._chosen_by_step.clear()
      self._chosen_by_step[step] = chosen
    return chosen

  def frames(self, chosen: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames (i, j, k) as `data.frames` wants them; see `sampling.FRAMES`."""
    i, j, k = chosen
    if self.frames_kind == "multi_view":
      return chosen
    return (j if i == k else i), k, k

  def example(
    self, rng: np.random.Generator, table: sampling.SubjectTable, subject: int,
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], caption: str, noun: str,
    ids: Sequence[tuple[int, int]] = (),
  ) -> dict[str, np.ndarray]:
    """One row; `images` and `masks` are those of frames (i, j, k), `caption` is frame k's.

    `ids`: each frame's (subject, frame) in the data set, for fixed placements; with a cache they
    stand for the pictures.
    """
    if self.cache is None:
      row = triples.make_triple(rng, images, masks, self.triple, ids)
    else:
      chosen = [triples.choose_placement(rng.random(3), self.triple) for _ in range(2)]
      row = self.cache.row(ids, *chosen)
    row |= self.labels(rng, table, subject, caption, noun)
    return {key: np.asarray(row[key], dtype) for key, dtype in self.signature.items()}

  def labels(
    self, rng: np.random.Generator, table: sampling.SubjectTable, subject: int, caption: str,
    noun: str,
  ) -> dict[str, np.ndarray]:
    """A row's token ids and the numbers of its subject, family and class."""
    if rng.random() < self._terse_prob:  # the row's last draw, so that no other depends on it
      caption = with_article(noun)
    numbers = {name: column[subject] for name, column in table._asdict().items()}
    return {**self.encode(caption, noun), **numbers}


def stack(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Rows to a batch."""
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
