"""Features of a frozen base beside the data, so that training need not compute them every step.

    my_subjects/                 the data
    my_subjects_features/        of a TFDS data set: features/ in its folder
      3f2a9c01b7de/              a hash of all that the numbers depend on (`Key`)
        00000.safetensors        a shard: so many frames of the data set, in its order
        ...
        manifest.json            comes last: a folder without it is incomplete

A shard appears whole or not at all. It holds of each frame the moments of the VAE's posterior and
the mask of the target, and the image features of its fixed placements (`data.placements`) as
reference and as positive. cc_jax.cache writes it; reading needs no JAX.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np
import safetensors
import safetensors.numpy

from data_pipeline.errors import DataError

VERSION = 1  # of the format
# What a batch holds in place of pictures -> as what the frame is shown there.
ROLES = {
  "target_moments": "target", "target_mask": "target", "reference_features": "reference",
  "reference_embed": "reference", "positive_features": "positive",
}  # fmt: skip
MANIFEST = "manifest.json"


class Networks(NamedTuple):
  """What the trainer adds to the key: the networks' hashes and settings, and how to call them."""

  settings: Mapping[str, Any]
  labels: Mapping[str, str]  # key of the settings -> what people call it, for errors
  command: str  # that writes the cache


@dataclasses.dataclass(frozen=True)
class Key:
  """All that the stored numbers depend on. Settings are what JSON knows."""

  settings: Mapping[str, Any]
  labels: Mapping[str, str]

  @property
  def folder_name(self) -> str:
    """The same for equal settings."""
    text = json.dumps({"version": VERSION, **self.settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

  def named(self, setting: str) -> str:
    """A setting's value in an error."""
    value, label = self.settings.get(setting), self.labels.get(setting)
    return f"{label} ({str(value)[:12]})" if label else json.dumps(value)

  def differences(self, other: "Key") -> list[str]:
    """The settings that differ, this key's named first."""
    names = [name for name in self.settings if self.settings[name] != other.settings.get(name)]
    return [f"{name} {self.named(name)}, not {other.named(name)}" for name in names]


class Layout:
  """Which row of which shard holds what.

  `subjects`: (number in the data set, which frames are references, which are positives), the flags
  as a text of 0 and 1 for the frames; `placements`: role -> how many rows a frame has;
  `per_shard`: frames of a shard.
  """

  def __init__(
    self, subjects: Sequence[tuple[int, str, str]], placements: Mapping[str, int], per_shard: int
  ):
    self.subjects, self.per_shard = [tuple(subject) for subject in subjects], per_shard
    self.placements = dict(placements)
    self.frames = [(number, f) for number, flags, _ in self.subjects for f in range(len(flags))]
    self._position = {frame: n for n, frame in enumerate(self.frames)}
    as_bools = lambda column: np.array([c == "1" for s in self.subjects for c in s[column]], bool)  # noqa: E731
    self._shown = {
      "target": np.ones(len(self.frames), bool), "reference": as_bools(1), "positive": as_bools(2)
    }  # fmt: skip
    self._rows = {role: self._number(role) for role in self._shown}

  def _number(self, role: str) -> np.ndarray:
    """int [frames]: the row of the first placement in the frame's shard; -1 where there is none."""
    shown = self._shown[role]
    before = np.cumsum(shown) - shown
    first = np.arange(len(shown)) // self.per_shard * self.per_shard
    return np.where(shown, (before - before[first]) * self.placements[role], -1)

  @property
  def shards(self) -> int:
    return -(-len(self.frames) // self.per_shard)

  def of_shard(self, shard: int) -> list[tuple[int, int]]:
    """Its frames, (subject, frame), in order."""
    return self.frames[shard * self.per_shard : (shard + 1) * self.per_shard]

  def count(self, role: str) -> list[int]:
    """The rows of each shard."""
    starts = range(0, len(self.frames), self.per_shard)
    shown = self._shown[role]
    return [int(shown[n : n + self.per_shard].sum()) * self.placements[role] for n in starts]

  def is_shown(self, role: str, frame: tuple[int, int]) -> bool:
    """Whether the frame has rows in this role."""
    return bool(self._shown[role][self._position[frame]])

  def find(self, role: str, frame: tuple[int, int], k: int) -> tuple[int, int]:
    """(shard, row) of placement k of the frame; where all look the same there is one row."""
    n = self._position[frame]
    row = int(self._rows[role][n])
    assert row >= 0, (role, frame)
    return n // self.per_shard, row + k % self.placements[role]


class FeatureCache:
  """The features of a complete folder, by frame and placement.

  Raises DataError that names the shard which is missing or broken. `command` makes it again.
  """

  def __init__(self, folder: Path, command: str):
    self._folder, self._command = folder, command
    manifest = read_manifest(folder)
    self._layout = Layout(manifest["subjects"], manifest["placements"], manifest["per_shard"])
    self.bad = {tuple(frame) for frame in manifest["bad"]}
    self.dtypes = {name: np.dtype(manifest["dtypes"][name]) for name in ROLES}
    self._open: dict[int, Any] = {}
    self._lock = threading.Lock()
    for shard, size in enumerate(manifest["sizes"]):
      file = shard_file(folder, shard)
      if not file.is_file() or file.stat().st_size != size:
        raise self._broken(file, "is missing" if not file.is_file() else "is truncated")

  def row(
    self, frames: Sequence[tuple[int, int]], positive_k: int, reference_k: int
  ) -> dict[str, np.ndarray]:
    """What is stored of frames (i, j, k), each (subject, frame), in place of their pictures."""
    of_role = {
      "positive": (frames[0], positive_k), "reference": (frames[1], reference_k),
      "target": (frames[2], 0),
    }  # fmt: skip
    row = {}
    for name, role in ROLES.items():
      shard, n = self._layout.find(role, *of_role[role])
      row[name] = self._shard(shard).get_slice(name)[n]
    return row

  def _shard(self, shard: int) -> Any:
    with self._lock:
      if shard not in self._open:
        file = shard_file(self._folder, shard)
        try:
          self._open[shard] = safetensors.safe_open(file, "numpy")
        except (safetensors.SafetensorError, OSError) as error:
          raise self._broken(file, f"is broken ({error})") from error
      return self._open[shard]

  def _broken(self, file: Path, how: str) -> DataError:
    return DataError(f"{file} {how}; make it again: {self._command}")


def find_cache(root: Path, key: Key, command: str) -> FeatureCache:
  """The cache of `key` below `root`.

  Raises DataError, with the command that makes it, if it is not there or incomplete; what is there
  in its place is named.
  """
  folder = root / key.folder_name
  if (folder / MANIFEST).is_file():
    return FeatureCache(folder, command)
  if folder.is_dir():
    raise DataError(f"{folder} is not complete; finish it: {command}")
  others = []
  for other in sorted(root.glob(f"*/{MANIFEST}")):
    with contextlib.suppress(DataError):  # of another format: not what is asked for
      others.append(known_key(other.parent))
  if not others:
    raise DataError(f"data.cached: {root} has no features yet; make them: {command}")
  nearest = min((key.differences(other) for other in others), key=len)
  raise DataError(
    f"data.cached: {root} has no features for this run, which has {'; '.join(nearest)} as those "
    f"that are there; make them: {command}"
  )


# ---- writing


def shard_file(folder: Path, shard: int) -> Path:
  return folder / f"{shard:05d}.safetensors"


def write_shard(
  folder: Path, shard: int, tensors: Mapping[str, np.ndarray], bad: Sequence[tuple[int, int]]
) -> None:
  """Writes a shard; `bad` are its frames that could not be read, whose rows mean nothing.

  Raises DataError if the storage does not take it.
  """
  contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  metadata = {"bad": json.dumps(sorted(bad))}
  _write(shard_file(folder, shard), safetensors.numpy.save(contiguous, metadata))


def bad_frames_of(folder: Path, shard: int, layout: Layout) -> list[list[int]] | None:
  """The frames of a finished shard that could not be read; None unless it is there and whole."""
  try:
    with safetensors.safe_open(shard_file(folder, shard), "numpy") as stored:
      frames = stored.get_slice("target_mask").get_shape()[0]
      whole = frames == len(layout.of_shard(shard))
      return json.loads(stored.metadata()["bad"]) if whole else None
  except (safetensors.SafetensorError, OSError, TypeError, KeyError):
    return None


def write_manifest(folder: Path, key: Key, layout: Layout, dtypes: Mapping[str, Any]) -> None:
  """Makes the folder complete. Raises DataError for a shard that is not there."""
  bad = []
  for shard in range(layout.shards):
    found = bad_frames_of(folder, shard, layout)
    if found is None:
      raise DataError(
        f"{shard_file(folder, shard)} is not there; all processes must write to one file system, "
        "which data.cache_dir names"
      )
    bad += found
  sizes = [shard_file(folder, shard).stat().st_size for shard in range(layout.shards)]
  manifest = dict(
    version=VERSION, settings=key.settings, labels=key.labels, subjects=layout.subjects,
    placements=layout.placements, per_shard=layout.per_shard, sizes=sizes, bad=bad,
    dtypes={name: np.dtype(dtype).name for name, dtype in dtypes.items()},
  )
  _write(folder / MANIFEST, json.dumps(manifest).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
  """Raises DataError for a file that this version did not write."""
  file = folder / MANIFEST
  try:
    manifest = json.loads(file.read_text())
    if manifest["version"] == VERSION:
      return manifest
    reason = f"it is of format {manifest['version']}, and this version reads {VERSION}"
  except (OSError, ValueError, TypeError, KeyError) as error:
    reason = f"{type(error).__name__}: {error}"
  raise DataError(f"{file} cannot be used ({reason}); delete {folder} and make it again")


def known_key(folder: Path) -> Key:
  """The key of a complete folder."""
  manifest = read_manifest(folder)
  return Key(manifest["settings"], manifest["labels"])


def _write(file: Path, content: bytes) -> None:
  temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    temporary.replace(file)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    reason = error.strerror or error
    raise DataError(
      f"{file} cannot be written ({reason}); make room, or set data.cache_dir to another folder"
    ) from error
