"""WebDataset: tar shards, whose members of one key are a frame, in `key.jpg key.json key.mask.png`.

Looked up (webdataset/webdataset, README and tariterators): a key is the path up to the first dot of
its last part, the rest of the name, in lower case, says what the member is; members of a key are
adjacent. Which keys belong to one subject is no part of that format. Here it is, in this order,
`subject`, `subject_id` or `object_id` of key.json, the folder of the key (SUBJECT/FRAME.jpg), or
what is in front of its last '_' (SUBJECT_0001.jpg). key.json also gives `class_noun` (or `noun`,
`class`, `category`), `caption` (or `captions`, `text`, `prompt`; else key.txt), `family`,
`is_reference`, `licence` and `creator`. The mask is key.mask.png, else a PNG's or WebP's alpha.

Pictures stay in the shards: a frame is a place in a tar file, which must not be compressed.
Writers that were killed leave shards that break off; what is whole of them is read.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath
from PIL.ContainerIO import ContainerIO

from data_pipeline import images
from data_pipeline.errors import DataError
from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings

_KEY = re.compile(r"((?:.*/|)[^./][^.]*)\.([^/]+)")
_PICTURES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether there are tar files in it."""
  return any(path.suffix == ".tar" for path in inside)


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """In the order of their first frames; a subject may go over several shards."""
  frames: dict[str, list[FrameRow]] = {}
  facts: dict[str, dict] = {}
  for name in sorted(texts.names_in(root)):
    if not name.endswith(".tar"):
      if name.endswith((".tar.gz", ".tgz", ".tar.zst")):
        found.bad(name, "it is compressed, so that no picture in it can be reached; unpack it to "
                  "a .tar")
      continue
    for key, members, file in _samples(root / name, found):
      try:
        frame, said = _frame(name, key, members, file)
      except (ValueError, DataError) as error:
        found.bad(f"{name}, {key}", str(error))
        continue
      subject = _subject(key, said)
      frames.setdefault(subject, []).append(frame)
      facts.setdefault(subject, said)
  masked = any(frame.mask_kind != "none" for rows in frames.values() for frame in rows)
  for subject, said in facts.items():
    more = {key: str(said.get(key) or "") for key in ("family", "licence", "creator")}
    yield SubjectRow(subject, _noun(said), found.masked(frames[subject], masked), **more)


def _samples(shard: epath.Path, found: Findings) -> Iterator[tuple[str, dict, BinaryIO]]:
  """(key, its members by ending: offset and length, or the bytes of texts; the open shard)."""
  key, members, end = None, {}, 0
  with shard.open("rb") as file:
    size = file.seek(0, 2)
    file.seek(0)
    try:
      # tarfile takes a cut header for the archive's end and says nothing: `end` tells.
      with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
          end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
          match = _KEY.fullmatch(member.name.removeprefix("./"))
          if not member.isfile() or not match or end > size:
            continue
          if match[1] != key:
            if members:
              yield key, members, file  # tarfile finds its place again whoever reads there
            key, members = match[1], {}
          ending = match[2].lower()
          is_text = ending in ("json", "txt")
          content = archive.extractfile(member).read() if is_text else None
          members[ending] = content if is_text else (member.offset_data, member.size)
    except tarfile.ReadError as error:
      if not end and size and not members:
        found.bad(shard.name, f"no tar file ({error})")
        return
    if members:
      yield key, members, file
  if end + _BLOCK > size:  # a whole archive ends with blocks of zeros
    found.bad(shard.name, f"the shard breaks off at byte {size}; fetch or write it again")


def _frame(shard: str, key: str, members: dict, file: BinaryIO) -> tuple[FrameRow, dict]:
  """The frame, and what its json says; ValueError where it is not whole."""
  kind = next((kind for kind in _PICTURES if kind in members), None)
  if kind is None:
    raise ValueError(f"no picture among {', '.join(members)}: a frame cut at a shard's end?")
  said = texts.read_json(epath.Path(shard), members["json"]) if "json" in members else {}
  if not isinstance(said, dict):
    raise ValueError('its json is no {"class_noun": ...}')
  noun = _noun(said)
  if not noun:
    raise ValueError("no class_noun in its json, or no json: a frame cut at a shard's end?")
  captions = next((said[name] for name in ("caption", "captions", "text", "prompt")
                   if said.get(name)), members.get("txt", b"").decode().strip())  # fmt: skip
  captions = captions if isinstance(captions, list) else [captions]
  mask = next((members[name] for name in ("mask.png", "mask.webp", "mask.jpg", "mask")
               if name in members), None)  # fmt: skip
  place = dict(mask_kind="none")
  if mask:
    place = dict(mask=shard, mask_offset=mask[0], mask_length=mask[1], mask_kind="file")
  elif kind in ("png", "webp") and _has_alpha(file, *members[kind]):
    place = dict(mask_kind="alpha")
  captions = tuple(texts.with_noun(str(caption), noun) for caption in captions)
  offset, length = members[kind]
  return FrameRow(
    shard, captions, picture_offset=offset, picture_length=length,
    is_reference=bool(said.get("is_reference", True)), **place), said


def _has_alpha(file: BinaryIO, offset: int, length: int) -> bool:
  try:
    return images.header_has_alpha(ContainerIO(file, offset, length), "the picture")
  except DataError:
    return True  # a broken picture: reading it will say so


def _noun(said: dict) -> str:
  names = ("class_noun", "noun", "class", "category")
  return texts.clean_noun(str(next((said[name] for name in names if said.get(name)), "")))


def _subject(key: str, said: dict) -> str:
  for name in ("subject", "subject_id", "object_id"):
    if said.get(name) is not None:
      return str(said[name])
  folder, _, last = key.rpartition("/")
  return folder or last.rpartition("_")[0] or last
