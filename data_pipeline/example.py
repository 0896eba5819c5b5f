"""From three frames of a subject and a caption to a row of a batch, the same for all sources."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from data_pipeline import sampling, tokens, triples
from data_pipeline.errors import DataError

# The keys and types of an example; for the shapes see `data_pipeline.make_loader`.
SIGNATURE = dict(
    positive=np.uint8, reference=np.uint8, target=np.uint8, target_mask=np.uint8,
    input_ids=np.int32, slot=np.int32, noun_span=np.int32,
    subject_id=np.int32, family_id=np.int32, class_id=np.int32,
)  # fmt: skip


class Maker:
  """Makes rows of the global batch. A row's random numbers depend on (seed, step, row) alone."""

  def __init__(self, data_config, tokenizer: Callable, *, batch_size: int, seed: int, s_words: int):
    self.triple = triples.TripleConfig.from_config(data_config)
    self._frames = data_config.frames
    sampling.check_frames(self._frames)
    self._terse_prob = data_config.caption_drop_detail_prob
    if not 0 <= self._terse_prob <= 1:
      raise DataError(f"data.caption_drop_detail_prob={self._terse_prob} must lie between 0 and 1")
    self._group, self._group_ratio = data_config.group, data_config.group_ratio
    self._batch_size, self._seed = batch_size, seed
    self.holdout = sampling.check_holdout(data_config.holdout_subjects)
    self.max_bad_share = sampling.check_bad_share(data_config.max_bad_share)
    encode = lambda caption, noun: tokens.encode_prompt(tokenizer, caption, noun, s_words)  # noqa: E731
    # A finite data set repeats its captions; the limit is for rendered ones, which are endless.
    self.encode = functools.lru_cache(maxsize=1 << 15)(encode)
    self._chosen_by_step: dict[int, np.ndarray] = {}

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
    if self._frames == "multi_view":
      return chosen
    return (j if i == k else i), k, k

  def example(
    self, rng: np.random.Generator, table: sampling.SubjectTable, subject: int,
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], caption: str, noun: str,
  ) -> dict[str, np.ndarray]:
    """One row; `images` and `masks` are those of frames (i, j, k), `caption` is frame k's."""
    row = triples.make_triple(rng, images, masks, self.triple)
    if rng.random() < self._terse_prob:  # the row's last draw, so that no other depends on it
      caption = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    row["input_ids"], row["slot"], row["noun_span"] = self.encode(caption, noun)
    row |= {name: column[subject] for name, column in table._asdict().items()}
    return {key: np.asarray(row[key], dtype) for key, dtype in SIGNATURE.items()}


def stack(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Rows to a batch."""
  return {key: np.stack([example[key] for example in examples]) for key in SIGNATURE}
