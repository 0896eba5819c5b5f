"""The types in which a TFDS data set may store frames, masks, captions, nouns and ids."""

from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources import tf_data

_IDS = ("subject_id", "family_id", "class_id")
_WANTED = {
    "frames": "Sequence(Image), or uint8 [frames, height, width, 3]",
    "masks": "Sequence(Image), or uint8 or bool [frames, height, width]",
    "captions": "Sequence(Text), or Sequence(Sequence(Text)) for several of each frame",
    "class_noun": "Text, or a ClassLabel with names",
    "is_reference": "Sequence(bool)",
} | dict.fromkeys(_IDS, "Text or a whole number")
NEEDED = ("frames", "masks", "captions", "class_noun", "subject_id")


class Schema:
  """The features of a data set, `where` for errors.

  Raises DataError, one line, for a feature that is missing or of a type that cannot be read.
  """

  def __init__(self, features: Any, where: str):
    self._tfds = tf_data.import_tfds()
    missing = [key for key in NEEDED if key not in features]
    if missing:
      raise DataError(
          f"data set {where} has no feature {missing[0]!r}; needed are {', '.join(NEEDED)}"
      )
    self._features = {key: features[key] for key in _WANTED if key in features}
    for key, feature in self._features.items():
      if not self._is_known(key, feature):
        raise DataError(
            f"data set {where}: the feature {key!r} is {_words(feature)}; it must be {_WANTED[key]}"
        )

  def _is_known(self, key: str, feature: Any) -> bool:
    shape, dtype = feature.shape, feature.np_dtype
    if isinstance(shape, dict):  # a sequence of several things
      return False
    kind = np.dtype(dtype).kind  # of texts 'O'
    if key in ("frames", "masks") and self._is_encoded(feature):
      return kind == "u"  # floating point numbers are stored as other pictures
    if key == "frames":
      return len(shape) == 4 and shape[-1] == 3 and dtype == np.uint8
    if key == "masks":
      is_grey = len(shape) == 3 or (len(shape) == 4 and shape[-1] == 1)
      return is_grey and dtype in (np.uint8, np.bool_)
    if key == "captions":
      return kind == "O" and len(shape) in (1, 2)
    if key == "class_noun":
      return len(shape) == 0 and (kind == "O" or self._has_names(feature))
    if key == "is_reference":
      return kind in "bui" and len(shape) == 1
    return kind in "Oui" and len(shape) == 0

  def _is_encoded(self, feature: Any) -> bool:
    """Whether the files hold pictures as PNG or JPEG."""
    return isinstance(getattr(feature, "feature", None), self._tfds.features.Image)

  def _has_names(self, feature: Any) -> bool:
    label = isinstance(feature, self._tfds.features.ClassLabel)
    return label and feature.names != [str(n) for n in range(feature.num_classes)]

  def noun(self, value: str | int) -> str:
    """The class noun that is stored as a text or a ClassLabel's number."""
    return value if isinstance(value, str) else self._features["class_noun"].int2str(value)

  def tensor(self, key: str, example: bytes) -> np.ndarray | None:
    """All frames or masks of an example, [frames, ...]; None where they are encoded pictures."""
    feature = self._features[key]
    if self._is_encoded(feature):
      return None
    # TFDS' own reader knows all the ways in which tensors are stored.
    read = self._tfds.features.FeaturesDict({key: feature}).deserialize_example(example)
    return np.asarray(read[key])


def _words(feature: Any) -> str:
  """The type of a feature in one line."""
  name, shape = type(feature).__name__, feature.shape
  if isinstance(shape, dict):
    return f"{name} of {', '.join(shape)}"
  sides = ["?" if side is None else side for side in shape]
  dtype = np.dtype(feature.np_dtype)
  return f"{name} of {'text' if dtype.kind == 'O' else dtype.name} [{', '.join(map(str, sides))}]"
