"""UNO-1M: pairs of pictures of one subject, with captions and a score of how alike they are.

Looked up (the data set's card; bytedance/UNO, README): labels/split1.json ..., or all of them in
uno_1m_total_labels.json, are lists of {img_path1, img_path2, caption {img_path1, img_path2,
judgment, subject [noun]}, vlm_filter_cot {score_part, score_final}}; paths are relative to images/,
whose splits people unpack in part. Its card advises a score_final of 3.5 or more; the paper took 4.
Some pairs lack a score. Pictures were generated; there are no masks. The labels of a split are
read at a time, where they are there: the file of all takes 8 GB of memory.
"""

from collections.abc import Iterator

from etils import epath

from data_pipeline.manifest import FrameRow, SubjectRow
from data_pipeline.readers import texts
from data_pipeline.readers.findings import Findings

_TOTAL = "uno_1m_total_labels.json"
_MIN_SCORE = 3.5
_KEYS = ("img_path1", "img_path2")


def recognise(root: epath.Path, inside: list[epath.Path]) -> bool:
  """Whether it has the labels of all pairs, or those of its splits."""
  return any(path.name == _TOTAL for path in inside) or bool(_split_labels(root))


def subjects(root: epath.Path, found: Findings) -> Iterator[SubjectRow]:
  """One for each pair; its name is that of the first picture."""
  there: dict[str, frozenset[str]] = {}
  for file in _split_labels(root) or [root / _TOTAL]:
    for pair in texts.read_json(file):
      row = _pair(root, pair, there, found)
      if row:
        yield row


def _split_labels(root: epath.Path) -> list[epath.Path]:
  names = [name for name in texts.names_in(root / "labels")
           if name.startswith("split") and name.endswith(".json")]
  return [root / "labels" / name for name in sorted(names)]


def _pair(root, pair: dict, there: dict, found: Findings) -> SubjectRow | None:
  caption, paths = pair.get("caption") or {}, [pair.get(key) for key in _KEYS]
  name, nouns = str(paths[0]).removesuffix(".png"), caption.get("subject") or []
  score = (pair.get("vlm_filter_cot") or {}).get("score_final")
  noun = texts.clean_noun(str(nouns[0])) if nouns else ""
  if not all(paths) or not noun or not any(caption.get(key) for key in _KEYS):
    found.unwanted(name, "it has no pair, subject word or caption")
  elif score is None or not _MIN_SCORE <= score <= 4:
    found.unwanted(name, f"score {score}, not {_MIN_SCORE} to 4")
  else:
    missing = [path for path in paths if not _is_there(root, path, there)]
    if missing:
      found.bad(name, f"images/{missing[0]} is missing", pictures=2)
      return None
    frames = [FrameRow(f"images/{path}", (texts.with_noun(caption.get(key) or "", noun),))
              for key, path in zip(_KEYS, paths)]  # fmt: skip
    return SubjectRow(name, noun, frames, licence="Apache-2.0", creator="UNO-1M")
  return None


def _is_there(root: epath.Path, path: str, there: dict) -> bool:
  folder, _, name = path.rpartition("/")
  if folder not in there:
    there[folder] = texts.names_in(root / "images" / folder)
  return name in there[folder]
