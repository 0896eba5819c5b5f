"""The frames of a manifest, decoded by Pillow: what any other reader of them is compared with."""

import concurrent.futures
import functools
import hashlib
import os
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath
from jaxtyping import UInt8

from data_pipeline import images, triples
from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, Manifest
from data_pipeline.sources import listing

_THREADS = 16  # that ask for the sizes of files, in buckets


def whole_path(root: str, path: str) -> epath.Path:
  """Of a frame's picture or mask; `path` may be whole itself (/..., gs://...)."""
  return epath.Path(root) / path if not re.match(r"/|\w+://", path) else epath.Path(path)


def open_blob(root: str, path: str, offset: int = 0, length: int = -1) -> bytes:
  """The bytes of a file, or of a part of one; DataError where they cannot be read."""
  file = whole_path(root, path)
  try:
    with file.open("rb") as opened:
      if offset:
        opened.seek(offset)
      data = opened.read(length)
  except OSError as error:
    reason = error.strerror or error
    raise DataError(f"{file} cannot be read ({reason}); check that it is there") from error
  if length >= 0 and len(data) < length:
    raise DataError(f"{file} breaks off: {offset + length} bytes are wanted; fetch it again")
  return data


def load_frame(root: str, frame: FrameRow) -> tuple[UInt8[np.ndarray, "h w 3"],
                                                   UInt8[np.ndarray, "h w"]]:
  """A frame's picture and mask, 255 = subject; without a mask all of the picture is the subject.

  Raises DataError, with the file's name, for what cannot be read, and for an empty mask.
  """
  file = whole_path(root, frame.picture)
  name = os.fspath(file)
  if file.suffix.lower() in listing.HEIF:
    listing.check_kind(file)
  picture = open_blob(root, frame.picture, frame.picture_offset, frame.picture_length)
  mask = None
  if frame.mask_kind == "file":
    mask = open_blob(root, frame.mask, frame.mask_offset, frame.mask_length)
  pixels, values = images.read_pair(picture, mask, name, frame.mask)
  turns = -frame.rotation // 90  # numpy turns counter-clockwise
  pixels = np.rot90(pixels, turns)
  if frame.mask_kind == "alpha":
    # A picture without alpha channel is opaque, as one whose channel is white everywhere.
    values = pixels[..., 3] if pixels.shape[-1] == 4 else np.full(pixels.shape[:2], 255, np.uint8)
  elif values is not None:
    values = np.rot90(values, turns)
    if values.shape != pixels.shape[:2]:
      values = resize_mask(values, pixels.shape[:2], name)
  else:
    values = np.full(pixels.shape[:2], 255, np.uint8)
  if frame.threshold:
    values = np.where(values >= frame.threshold, 255, 0).astype(np.uint8)
  pixels = pixels[..., :3]
  if any(frame.box):
    x0, y0, x1, y1 = frame.box
    pixels, values = pixels[y0:y1, x0:x1], values[y0:y1, x0:x1]
  pixels, values = np.ascontiguousarray(pixels), np.ascontiguousarray(values)
  triples.check_frame(pixels, values, name)
  return pixels, values


def resize_mask(mask: UInt8[np.ndarray, "h w"], sides: tuple[int, int],
                name: str) -> UInt8[np.ndarray, "h w"]:
  """A mask of another size but the picture's proportions, by nearest neighbour; else DataError."""
  (height, width), (rows, columns) = sides, mask.shape
  if abs(rows * width - columns * height) > max(height, width, rows, columns):
    raise DataError(f"{name}: its mask has {columns} x {rows} pixels, the picture {width} x "
                    f"{height}, of other proportions; give a mask that fits")
  image = images.Image.fromarray(mask)
  return np.asarray(image.resize((width, height), images.Image.Resampling.NEAREST))


class ManifestSubjects:
  """The subjects of a manifest, a `data_pipeline.sources.rows.SubjectSet`."""

  def __init__(self, manifest: Manifest, features_folder: epath.PathLike | None = None):
    self.manifest, self.where = manifest, manifest.where
    self.names = manifest.subjects["name"].to_pylist()
    self.table = manifest.subject_table()
    self.pictures = manifest.frames.num_rows
    self._first = manifest.subjects["first"].to_numpy()
    self._count = manifest.subjects["count"].to_numpy()
    self._is_reference = manifest.frames["is_reference"].to_numpy(zero_copy_only=False)
    root = listing.data_path(manifest.root, "data.name")
    self.features_folder = epath.Path(features_folder or root.parent / f"{root.name}_features")

  def __getitem__(self, number: int) -> "ManifestSubject":
    return ManifestSubject(self.manifest, number, int(self._first[number]),
                           self._is_reference[self._first[number]:][:self._count[number]])

  def fingerprint(self) -> str:
    """A hash of the manifest, of where its files are, and of their sizes.

    It looks at every file, and is asked for only where features of them are stored.
    """
    manifest = self.manifest
    paths = pc.unique(pa.chunked_array(
      [*manifest.frames["picture"].chunks, *manifest.frames["mask"].chunks])).to_pylist()
    paths = sorted(filter(None, paths))
    digest = hashlib.sha256(f"{manifest.fingerprint()} {manifest.root}\n".encode())
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      groups = (paths[n : n + 100] for n in range(0, len(paths), 100))
      for sizes in pool.map(functools.partial(_sizes, manifest.root), groups):
        digest.update(np.array(sizes, "<i8").tobytes())
    return digest.hexdigest()


def _sizes(root: str, paths: Sequence[str]) -> list[int]:
  """Of files in bytes; -1 where there is none, which reading it will say."""
  sizes = []
  for path in paths:
    try:
      if listing.is_local(root) and listing.is_local(path):
        sizes.append(os.stat(os.path.join(root, path)).st_size)
      else:
        sizes.append(whole_path(root, path).stat().length)
    except OSError:
      sizes.append(-1)
  return sizes


class ManifestSubject:
  """One subject of a manifest, a `data_pipeline.sources.rows.Subject`."""

  def __init__(self, manifest: Manifest, number: int, first: int, is_reference: np.ndarray):
    self._manifest, self._first, self._is_reference = manifest, first, is_reference
    self.noun = manifest.subjects["noun"][number].as_py()
    self.where = f"{manifest.where}, subject {manifest.subjects['name'][number].as_py()}"

  def is_reference(self) -> np.ndarray:
    """bool [frames]: can frame f serve as a reference?"""
    return self._is_reference

  def captions(self, f: int) -> list[str]:
    """Frame f's captions."""
    return self._manifest.frames["captions"][self._first + f].as_py()

  def frame(self, f: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame f's picture uint8 [h, w, 3] and mask uint8 [h, w]."""
    return load_frame(self._manifest.root, self._manifest.frame(self._first + f))

  def files(self, f: int) -> tuple[str, FrameRow]:
    """The folder that frame f's files are relative to, and the frame."""
    return self._manifest.root, self._manifest.frame(self._first + f)
