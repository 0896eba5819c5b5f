"""Data sets whose frames are on disk: how one is opened, and what a feature cache stores of it."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import sampling, triples
from data_pipeline.errors import DataError
from data_pipeline.feature_cache import FeatureCache, Key, Layout, Networks, find_cache
from data_pipeline.sources.builders import open_builder
from data_pipeline.sources.listing import data_path, is_local
from data_pipeline.sources.rows import BadPictures, SubjectSet, training_subjects


def open_subjects(data_config: Any, split: str = "train") -> tuple[SubjectSet, int]:
  """(the subjects of `config.data`, how many of them training leaves out).

  Source 'folder', 'captures' or 'tfds'. Raises DataError for data that cannot be used.
  """
  holdout = sampling.check_holdout(data_config.holdout_subjects)
  lenient = sampling.check_bad_share(data_config.max_bad_share) > 0
  if data_config.source == "folder":
    from data_pipeline.sources.folder import FolderSubjects

    return FolderSubjects(data_config.name, lenient=lenient), holdout
  if data_config.source == "captures":
    from data_pipeline.readers import open_captures

    return open_captures(data_config, split), holdout
  from data_pipeline.sources.tfds_source import SubjectRecords, check_holdout

  builder = open_builder(data_config)
  subjects = SubjectRecords(builder, split)
  return subjects, check_holdout(builder, split, holdout)


def check_cacheable(data_config: Any) -> None:
  """Raises DataError for settings with which no features can be stored."""
  if data_config.source == "render":
    raise DataError(
      "data.source='render' shows new views in every step: they have no fixed placements, and "
      "nothing can be stored; use data.source='tfds', or data.placements=0 and data.cached=False"
    )
  if not data_config.placements:
    raise DataError(
      "data.placements=0 places subjects anew in every step, and nothing can be stored; set it to "
      "the number of fixed placements of each frame, such as data.placements=4"
    )


class StoredFrames:
  """The frames that training may show: what is stored of each, and where.

  `subjects` and `heldout` are those of `open_subjects`. Raises DataError as `check_cacheable` does.
  """

  def __init__(self, data_config: Any, networks: Networks, subjects: SubjectSet, heldout: int):
    check_cacheable(data_config)
    self._triple, self._subjects = triples.TripleConfig.from_config(data_config), subjects
    self._numbers = training_subjects(subjects, heldout)
    self._bad = BadPictures(float(data_config.max_bad_share), subjects.pictures)
    self._frames, self._lenient = data_config.frames, data_config.max_bad_share > 0
    settings = dict(
      networks.settings, data=subjects.fingerprint(), frames=self._frames, lenient=self._lenient,
      subjects=hashlib.sha256(self._numbers.astype("<i8").tobytes()).hexdigest(),
      **dataclasses.asdict(self._triple),
    )
    labels = {"data": subjects.where, "subjects": f"{len(self._numbers)} subjects"}
    self.key = Key(json.loads(json.dumps(settings)), {**networks.labels, **labels})
    folder = subjects.features_folder
    if data_config.cache_dir:
      folder = data_path(data_config.cache_dir, "data.cache_dir")
    if not is_local(folder):
      raise DataError(f"features cannot lie in {folder}; set data.cache_dir to a local folder")
    self.root = Path(folder)

  @property
  def folder(self) -> Path:
    """Where the features of these frames and networks lie, complete or not."""
    return self.root / self.key.folder_name

  def layout(self, per_shard: int) -> Layout:
    """Reads which frames are references: a pass over the data set, without its pictures."""
    subjects = [(int(number), *self._roles(int(number))) for number in self._numbers]
    placements = dict(target=1, reference=self._triple.reference_placements,
                      positive=self._triple.placements)  # fmt: skip
    return Layout(subjects, placements, per_shard)

  def _roles(self, number: int) -> tuple[str, str]:
    """Which frames of a subject may be references, and which positives: 1 for those."""
    is_reference = self._subjects[number].is_reference()
    # Bad pictures, which nobody knows before they are read, are replaced by any other frame.
    drawn = np.ones(len(is_reference), bool)
    if not self._lenient:
      drawn = sampling.can_be_drawn(is_reference)
    references = drawn if self._frames == "multi_view" else np.ones_like(drawn)
    as_text = lambda flags: "".join("01"[int(flag)] for flag in flags)  # noqa: E731
    return as_text(references), as_text(drawn)

  def pictures(
    self, frame: tuple[int, int], layout: Layout
  ) -> tuple[dict[str, np.ndarray], bool]:
    """(what a frame (subject, frame) looks like in each role, whether it could be read).

    target uint8 [1, s, s, 3], target_mask uint8 [1, s, s], reference and positive uint8 [k, s, s,
    3] for their placements, k = 0 where the frame is not shown so. A bad frame is all white.
    """
    (number, f), size = frame, self._triple.image_size
    pair = self._bad.load(self._subjects[number], number, f)
    is_good = pair is not None
    if pair is None:
      pair = np.full((size, size, 3), 255, np.uint8), np.full((size, size), 255, np.uint8)
    target, mask = triples.square(*pair, size)
    shown: dict[str, list[np.ndarray]] = {"reference": [], "positive": []}
    show = {"positive": triples.show_positive, "reference": triples.show_reference}
    for role in shown:
      for k in range(layout.placements[role] if layout.is_shown(role, frame) else 0):
        u = triples.placement(number, f, k)[role == "reference"]
        shown[role].append(show[role](*pair, self._triple, u))
    empty = np.zeros((0, size, size, 3), np.uint8)
    stacked = {role: np.stack(many) if many else empty for role, many in shown.items()}
    return dict(target=target[None], target_mask=mask[None], **stacked), is_good

  def open(self, command: str) -> FeatureCache:
    """Raises DataError, with the command that makes them, unless all features are there."""
    return find_cache(self.root, self.key, command)

