"""What a preparation is asked to do."""

import dataclasses
import importlib
import re
from collections.abc import Callable
from typing import Any

from data_pipeline import sampling
from data_pipeline.errors import DataError
from data_pipeline.words import with_article

FILE_FORMATS = ("tfrecord", "array_record")
ENCODINGS = ("jpeg", "png")


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that what is written depends on, beside the manifest.

  Attributes:
    name: of the TFDS data set that is written.
    segmenter: FILE.onnx[:KIND] for frames without a mask (`data_pipeline.segment`); '' = none.
    captioner: 'module:function' for frames without a caption, called as function(picture uint8
      [h, w, 3], class_noun) -> text; '' = `caption_template`.
    caption_template: with {noun} in the class noun's place, and {a} for 'a' or 'an'.
    margin: around the subject on all sides, as a share of its longer side; inf = no crop.
    max_side: pixels; larger frames are made smaller.
    min_subject: pixels; the longer side of a subject in what is written.
    copy_bits: frames whose hashes of 256 bits differ in at most so many, and whose colours agree,
      are copies, of which the first stays; -1 keeps all.
    max_bad_share: of all frames, how many may be unusable.
    encoding: of frames, 'jpeg' (quality 95, full colour) or 'png'; masks are PNG.
    file_format: 'tfrecord', or 'array_record' for random access from a local disk.
    frames_per_shard: about so many frames lie in a file.
  """

  name: str
  segmenter: str = ""
  captioner: str = ""
  caption_template: str = "a photo of {a} {noun}"
  margin: float = 0.5
  max_side: int = 1024
  min_subject: int = 32
  copy_bits: int = 4
  max_bad_share: float = 0.0
  encoding: str = "jpeg"
  file_format: str = "tfrecord"
  frames_per_shard: int = 512

  def check(self) -> None:
    """Raises DataError for a value that cannot be."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
      raise DataError(f"--name={self.name!r} cannot be a TFDS data set's name; use small letters, "
                      "digits and _, a letter first")
    if not self.margin >= 0:
      raise DataError(f"--margin={self.margin} must be at least 0; inf leaves frames uncropped")
    for key, least in (("max_side", 16), ("min_subject", 1), ("frames_per_shard", 1)):
      if getattr(self, key) < least:
        raise DataError(f"--{key}={getattr(self, key)} must be at least {least}")
    if not -1 <= self.copy_bits <= 7:
      raise DataError(f"--copy_bits={self.copy_bits} must lie in -1 (keep copies) to 7")
    for key, known in (("encoding", ENCODINGS), ("file_format", FILE_FORMATS)):
      if getattr(self, key) not in known:
        raise DataError(f"--{key}={getattr(self, key)} is unknown; use {' or '.join(known)}")
    try:
      self.template_caption("noun")
    except (KeyError, IndexError, ValueError) as error:
      raise DataError(f"--caption_template={self.caption_template!r} cannot be filled in "
                      f"({error}); it may have {{noun}} and {{a}}") from error
    if "{noun}" not in self.caption_template:
      raise DataError(f"--caption_template={self.caption_template!r} lacks {{noun}}, the class "
                      "noun, which every caption has")
    sampling.check_bad_share(self.max_bad_share)
    self.load_captioner()

  def template_caption(self, noun: str) -> str:
    """The template's caption of a class noun."""
    article = with_article(noun).removesuffix(noun).strip()  # of scissors there is none
    return " ".join(self.caption_template.format(noun=noun, a=article).split())

  def load_captioner(self) -> Callable[[Any, str], str] | None:
    """The captioner's function; None where none is named. DataError: it cannot be imported."""
    if not self.captioner:
      return None
    module, _, function = self.captioner.partition(":")
    try:
      found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
      raise DataError(f"--captioner={self.captioner} cannot be imported ({error}); write "
                      "module:function, and have the module on PYTHONPATH") from error
    if not callable(found):
      raise DataError(f"--captioner={self.captioner} is no function")
    return found
