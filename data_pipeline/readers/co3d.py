"""CO3Dv2: CATEGORY/frame_annotations.jgz, sequence_annotations.jgz and the files they name.

Looked up (facebookresearch/co3d 92283c4, co3d/dataset/data_types.py, README): both are gzipped
JSON lists. A frame has sequence_name, frame_number (not the number in the file's name),
image {path, size [H, W]}, mask {path, mass} or null; paths are relative to ROOT. Masks hold
probabilities times 255; mass is their sum in pixels. A sequence has viewpoint_quality_score, larger
is better, perhaps null; peers keep those above 0.5 (naver/dust3r, preprocess_co3d.py). Downloads
come in chunks, so that annotated files may be missing.
"""

import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterator

from etils import epath

from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings
from data_pipeline.sources import listing

_FRAMES, _SEQUENCES = "frame_annotations.jgz", "sequence_annotations.jgz"
_MIN_QUALITY = 0.5  # of the cameras; where they failed, the masks' tracking often did too
_MIN_MASS = 0.01  # share of the picture that the subject covers
_THRESHOLD = 128  # more likely the subject than not
LICENCE = "CC-BY-NC-4.0"
NOTES = ("CO3D's licence (CC BY-NC 4.0) forbids commercial use",)
_NOUNS = {
  "baseballbat": "baseball bat", "baseballglove": "baseball glove", "hairdryer": "hair dryer",
  "hotdog": "hot dog", "parkingmeter": "parking meter", "stopsign": "stop sign",
  "teddybear": "teddy bear", "toybus": "toy bus", "toyplane": "toy plane",
  "toytrain": "toy train", "toytruck": "toy truck", "wineglass": "wine glass",
  "remote": "remote control", "mouse": "computer mouse", "cellphone": "cell phone",
}  # fmt: skip


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether a folder in it has annotations of frames."""
  return any((path / _FRAMES).exists() for path in inside if path.is_dir())


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """One for each sequence."""
  for category in listing.entries(root):
    if not category.is_dir() or not (category / _FRAMES).exists():
      continue
    noun = _NOUNS.get(category.name, texts.clean_noun(category.name))
    quality = {item["sequence_name"]: item.get("viewpoint_quality_score")
               for item in _read(category / _SEQUENCES)}  # fmt: skip
    frames = defaultdict(list)
    for frame in _read(category / _FRAMES):
      frames[frame["sequence_name"]].append(frame)
    for sequence in sorted(frames):
      name, score = f"{category.name}/{sequence}", quality.get(sequence)
      if score is not None and score <= _MIN_QUALITY:
        found.unwanted(name, f"viewpoint quality {score:.2f}, at most {_MIN_QUALITY}")
        continue
      there = {kind: texts.names_in(root / name / kind) for kind in ("images", "masks")}
      rows = [_frame(frame, noun, there, found)
              for frame in sorted(frames[sequence], key=lambda frame: frame["frame_number"])]
      yield SubjectRow(name, noun, [row for row in rows if row], licence=LICENCE)


def _frame(frame: dict, noun: str, there: dict, found: Findings) -> FrameRow | None:
  image, mask = frame.get("image") or {}, frame.get("mask") or {}
  path = image.get("path") or ""
  name = path or f"{frame['sequence_name']}, frame number {frame['frame_number']}"
  if not path or (found.needs_masks and not mask.get("path")):
    found.unwanted(name, "hidden by its authors: no picture or mask is named")
    return None
  is_there = lambda kind, file: bool(file) and file.rsplit("/", 1)[-1] in there[kind]  # noqa: E731
  has_mask = is_there("masks", mask.get("path"))
  if not is_there("images", path) or (found.needs_masks and not has_mask):
    missing = mask["path"] if is_there("images", path) else path
    found.bad(name, f"{missing} is missing")
    return None
  height, width = image.get("size") or (0, 0)
  if mask.get("mass") is not None and mask["mass"] < _MIN_MASS * height * width:
    found.unwanted(name, f"its subject covers {mask['mass']:.0f} of {height * width} pixels")
    return None
  place = dict(mask=mask["path"], mask_kind="file", threshold=_THRESHOLD) if has_mask else {}
  return FrameRow(path, (texts.plain_caption(noun),), height=height, width=width, **place)


def _read(file: epath.Path) -> list[dict]:
  try:
    content = gzip.decompress(file.read_bytes())
  except (OSError, EOFError, zlib.error) as error:
    raise DataError(f"{file} cannot be read ({error}); fetch it again") from None
  return texts.read_json(file, content)
