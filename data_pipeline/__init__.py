"""Input pipelines and the rendered world; imports nothing of cc_jax.

Training reads its data through `check_folder`, `check_cached`, `make_loader` and `heldout_subjects`
only.
Tensorflow is imported only when a loader of source 'tfds', 'folder' or 'captures' is made, or for a
TFDS data set.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from data_pipeline.errors import DataError
from data_pipeline.feature_cache import Networks
from data_pipeline.sampling import DECODERS
from data_pipeline.sources.builders import is_subjects3d, open_builder

__all__ = [
  "DECODERS", "DataError", "check_cached", "check_folder", "context_phrases", "heldout_subjects",
  "is_subjects3d", "load_subjects", "make_loader", "subjects_per_split",
]

SOURCES = ("tfds", "render", "folder", "captures")


def make_loader(
    data_config,
    tokenizers: Callable | Sequence[Callable],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    s_words: int = 2,
    split: str = "train",
    networks: Networks | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Endless batches of triples (docs/method.md, "Data"): a pure function of (seed, step).

  A loader that starts at step s yields the same batches as one that has done s steps. The hosts'
  batches are slices of a global batch that does not depend on the number of hosts.

  Args:
    data_config: `config.data` of `configs/subjects3d.py`.
    tokenizers: a CLIPTokenizer, or what behaves like one; T is its `model_max_length`. A base
      with two text encoders has two, which may pad and split words differently.
    batch_size: of the global batch; a multiple of process_count.
    seed: determines everything random, together with the step.
    start_step: the first batch's step.
    process_index, process_count: this host's index, and the number of hosts.
    rows: indices into the global batch of this host's b rows; by default consecutive ones.
    s_words: number of S+ words for which captions leave room.
    split: of the TFDS data set or the rendered world; a folder has 'train' only,
      of captures Open Images has others.
    networks: with data.cached, what the stored features must be of.

  Returns:
    An iterator over dicts of numpy arrays, b = batch_size / process_count, s = image_size:
      positive     uint8 [b, s, s, 3]  frame i on white, at a random size and place
      reference    uint8 [b, s, s, 3]  frame j on white, centred, a fixed share of the canvas
      target       uint8 [b, s, s, 3]  frame k with its background
      target_mask  uint8 [b, s, s]     its subject, 255 = opaque
      input_ids    int32 [b, T]        frame k's caption without S+, at most T - s_words tokens
      slot         int32 [b]           index right after the class noun's tokens, where S+ goes
      noun_span    int32 [b, 2]        the class noun's tokens [start, end), end == slot
      subject_id, family_id, class_id  int32 [b], -1 where unknown
    With two tokenizers also input_ids_2, slot_2 and noun_span_2, those of the second. With
    data.cached the pictures are replaced by what is stored of them (`feature_cache.ROLES`):
      target_moments      [b, h, w, 2 c]  mean and log-variance of the VAE's posterior
      reference_features  [b, p, d]       and positive_features: hidden states of the image encoder
      reference_embed     [b, e]          its embedding

  Raises:
    DataError: a config value or input data that cannot be used, at once or with the batch that
      meets it.
  """
  from data_pipeline.example import Maker
  from data_pipeline.sources import stored
  from data_pipeline.sources.rows import make_batches

  source = data_config.source
  if source not in SOURCES:
    raise DataError(f"data.source={source!r} is unknown; choose one of {', '.join(SOURCES)}")
  if batch_size < 1 or batch_size % process_count:
    raise DataError(
        f"batch size {batch_size} cannot be split over {process_count} hosts; use a multiple"
    )
  if not isinstance(tokenizers, list | tuple):
    tokenizers = (tokenizers,)
  maker = Maker(data_config, tokenizers, batch_size=batch_size, seed=seed, s_words=s_words)
  if rows is None:
    local_batch = batch_size // process_count
    rows = range(process_index * local_batch, (process_index + 1) * local_batch)
  if source == "render":
    from data_pipeline.sources import render

    if maker.holdout:
      logging.log_first_n(
        logging.WARNING, "data.holdout_subjects=%d has no effect: rendered subjects have splits", 1,
        maker.holdout)
    if maker.triple.placements or data_config.cached:
      stored.check_cacheable(data_config)
    return render.batches(maker, split=split, start_step=start_step, rows=rows)
  if source == "folder" and split != "train":
    raise DataError(f"a folder has no split {split!r}; use split='train' or another folder")
  subjects, heldout = stored.open_subjects(data_config, split)
  if source == "folder":
    subjects.check_captions(maker.encode)
  if source == "captures" or (source == "tfds" and not is_subjects3d(data_config)):
    from data_pipeline.readers.texts import shortened  # nobody wrote those captions for us

    maker.encode = shortened(maker.encode)
  if data_config.cached:
    frames = stored.StoredFrames(data_config, networks, subjects, heldout)
    maker.read_features(frames.open(networks.command))
  return make_batches(maker, subjects, heldout=heldout, start_step=start_step, rows=rows)


def check_folder(data_config) -> None:
  """Raises DataError for a folder or captures that cannot be trained on; other sources pass.

  It reads names, captions.json files and headers of pictures. A training does so before it loads
  (or downloads) its base.
  """
  if data_config.source not in ("folder", "captures"):
    return
  from data_pipeline import sampling
  from data_pipeline.sources import stored

  subjects, _ = stored.open_subjects(data_config)
  holdout = sampling.check_holdout(data_config.holdout_subjects)
  sampling.choose_heldout(subjects.names, subjects.table.family_id, holdout, subjects.where)


def check_cached(data_config) -> None:
  """Raises DataError where data.cached asks for features of data that can have none."""
  if data_config.cached:
    from data_pipeline.sources import stored

    stored.check_cacheable(data_config)


def heldout_subjects(data_config, count: int, seed: int = 0) -> list:
  """Subjects for pictures that are drawn while training goes on, of any data set on disk.

  They are those that training leaves out (`data.holdout_subjects`); of a TFDS data set with a
  split 'validation' or 'test', that split's. Where nothing is left out they are training subjects.

  Args:
    data_config: `config.data`.
    count: how many at most; there may be fewer.
    seed: which of them, in which order, and which of their frames.

  Returns:
    A list of `data_pipeline.heldout.HeldoutSubject`: name, class_noun, image uint8 [h, w, 3],
    mask uint8 [h, w], caption, held_out.

  Raises:
    DataError: data that cannot be used, or source 'render', whose subjects are rendered anew
      (`load_subjects`).
  """
  from data_pipeline import heldout, sampling

  bad_share = sampling.check_bad_share(data_config.max_bad_share)
  holdout = sampling.check_holdout(data_config.holdout_subjects)
  if data_config.source == "folder":
    from data_pipeline.sources import folder

    subjects, has_split = folder.FolderSubjects(data_config.name, lenient=bad_share > 0), False
  elif data_config.source == "captures":
    from data_pipeline import readers

    subjects, has_split = readers.open_captures(data_config), False
  elif data_config.source == "tfds":
    from data_pipeline.sources import tfds_source

    builder = open_builder(data_config)
    split = tfds_source.heldout_split(builder)
    subjects, has_split = tfds_source.SubjectRecords(builder, split or "train"), bool(split)
  else:
    raise DataError(f"data.source={data_config.source!r} has no stored subjects; use 'tfds'")
  return heldout.draw_subjects(
      subjects, count, seed, holdout=holdout, has_split=has_split, max_bad_share=bad_share
  )


def context_phrases(data_config) -> Sequence[str]:
  """The scenes that captions of the data name; () where nothing is known of the captions."""
  from data_pipeline.subjects3d.factors import SCENES

  return SCENES if is_subjects3d(data_config) else ()


def subjects_per_split() -> dict[str, int]:
  """The splits of the rendered world, and how many subjects each has."""
  from data_pipeline.subjects3d import factors

  return {split: len(factors.subjects(split).subject_id) for split in factors.SPLITS}


def load_subjects(name: str, split: str, data_dir: str = "", *, source: str = "tfds", count=None):
  """The subjects of a split of subjects3d with all frames and factors, for evaluation.

  Args:
    name: 'subjects3d/small' (or '/full', '/tiny').
    split: 'train' | 'validation' | 'test'.
    data_dir: where TFDS data sets are; '' = the library's default.
    source: 'tfds' reads the data set (and builds it on first use); 'render' renders the same
      frames again, without tensorflow.
    count: number of subjects, the first ones of the split; all by default.

  Returns:
    `data_pipeline.subjects3d.multi_view.MultiView`.
  """
  from data_pipeline.subjects3d import multi_view

  if source == "render":
    return multi_view.render_subjects(name, split, count)
  from data_pipeline.subjects3d import builder

  return builder.read_subjects(name, split, data_dir, count)
