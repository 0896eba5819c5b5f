"""SynCD: groups of generated pictures of one object, with masks, captions and scores.

Looked up (nupurkmr9/syncd 3082be9, method/data/data.py): *metadata.json, or
*metadata_with_scores.json, is a list of {filenames, prompts, dino_scores [n][n],
aesthetics_scores {stem: score}}; filenames are relative to the metadata's folder. A mask is
masks/STEM.jpg beside the picture, a JPEG, of another size perhaps. The authors keep a picture that
has a partner of a DINO similarity of at most 0.98: above it pairs are nearly copies. No class noun
is given.
"""

import json
from collections.abc import Iterator

from etils import epath

from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings

_MAX_SIMILARITY = 0.98
_THRESHOLD = 128  # the masks are JPEGs, whose black is not quite black
_NOUN = "object"
_FIRST = 1 << 20  # bytes in which a first group is whole
NOTES = ("SynCD names no class nouns: every subject is an 'object'; its pictures come from "
         "FLUX.1-dev, whose licence limits their use",)  # fmt: skip


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether it, or a folder in it, has the metadata: other programs have files of that name."""
  return any(_metadata(folder) for folder in (root, *(p for p in inside if p.is_dir())))


def _metadata(folder: epath.Path) -> list[str]:
  """With scores, where there are both."""
  names = texts.names_in(folder)
  of_groups = lambda end: [name for name in sorted(names)  # noqa: E731
                           if name.endswith(end) and _has_groups(folder / name)]
  return of_groups("metadata_with_scores.json") or of_groups("metadata.json")


def _has_groups(file: epath.Path) -> bool:
  """Whether it is a list that begins with a group of pictures; not all of it is read."""
  try:
    with file.open("rb") as opened:
      text = opened.read(_FIRST).decode(errors="replace").lstrip()
    group, _ = json.JSONDecoder().raw_decode(text[1:].lstrip()) if text[:1] == "[" else ({}, 0)
  except (OSError, ValueError):
    return False
  return isinstance(group, dict) and {"filenames", "prompts"} <= set(group)


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """One for each group of pictures."""
  there: dict[str, frozenset[str]] = {}
  inside = sorted(texts.names_in(root))
  for folder in ("", *(name for name in inside if (root / name).is_dir())):
    for file in _metadata(root / folder if folder else root):
      path = f"{folder}/{file}" if folder else file
      for number, group in enumerate(texts.read_json(root / path)):
        name = f"{path.removesuffix('.json')} {number}"
        frames = list(_frames(root, folder, group, there, found))
        if len(group.get("filenames", ())) >= 2 and not frames:
          found.unwanted(name, f"all its pairs are more alike than {_MAX_SIMILARITY}, or broken")
        else:
          yield SubjectRow(name, _NOUN, frames, creator="SynCD")


def _frames(root, folder: str, group: dict, there: dict, found: Findings) -> Iterator[FrameRow]:
  files, scores = group.get("filenames", ()), group.get("dino_scores")
  for n, (file, prompt) in enumerate(zip(files, group.get("prompts", ()))):
    path = f"{folder}/{file}" if folder else file
    row = scores[n] if scores and n < len(scores) else ()
    others = [score for m, score in enumerate(row) if m != n]
    if others and min(others) > _MAX_SIMILARITY:
      found.unwanted(path, f"nearly a copy of the others: a similarity above {_MAX_SIMILARITY}")
      continue
    place, _, name = path.rpartition("/")
    mask = f"{place}/masks/{name.rsplit('.', 1)[0]}.jpg".lstrip("/")
    missing = [p for p in (path, mask) if not _is_there(root, p, there)]
    if path in missing or (missing and found.needs_masks):
      found.bad(path, f"{missing[0]} is missing")
      continue
    kind = {} if missing else dict(mask=mask, mask_kind="file", threshold=_THRESHOLD)
    yield FrameRow(path, (texts.with_noun(prompt, _NOUN),), **kind)


def _is_there(root: epath.Path, path: str, there: dict) -> bool:
  folder, _, name = path.rpartition("/")
  if folder not in there:
    there[folder] = texts.names_in(root / folder if folder else root)
  return name in there[folder]
