"""Subjects, nouns and prompts of a benchmark, read from the folder that its authors publish.

dreambench       github.com/google/dreambooth at e9b8c01: `dataset/NAME/00.jpg ...` and
                 `dataset/prompts_and_classes.txt`: lines `name,class` under "subject_name,class",
                 and two lists of 25 templates 'a {0} {1} in the jungle', under "Object Prompts" and
                 "Live Subject Prompts". The file does not say who is live: cats and dogs are.
dreambench_plus  github.com/yuangpeng/dreambench_plus, dreambench_plus_dataset.py at df0b960:
                 `images/**/CATEGORY/00.jpg` and `captions/**/CATEGORY/00.txt`, whose first line is
                 the subject and every other one a prompt.
folder           `NAME/*.jpg ...`, `NAME/class.txt` (the class noun), and `prompts.txt`, or
                 `NAME/prompts.txt` for one subject: a prompt a line, with {} for the noun.

A mask lies beside its picture (00.jpg and 00_mask.png, white = subject) or is its alpha channel.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from cc_jax.errors import UserError, first_names

LIVE = ("cat", "dog")
PLAIN, EDITING = "R", "E"  # as in the paper's table
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_GREY = ("1", "L", "LA", "I", "I;16", "F")
_LIST = "prompts_and_classes.txt"


@dataclasses.dataclass(frozen=True)
class Subject:
  """A subject; `masks` has a path or None for every picture (None: alpha channel, or whole)."""

  name: str
  noun: str
  pictures: tuple[Path, ...]
  masks: tuple[Path | None, ...]
  prompts: tuple[tuple[str, str], ...]  # (PLAIN or EDITING, text without the unique token)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What a folder asks for, and what is to be said about it."""

  name: str
  subjects: tuple[Subject, ...]
  notes: tuple[str, ...]  # what was taken differently than one may think


def read_benchmark(name: str, folder: str | Path, names: Sequence[str] = ()) -> Benchmark:
  """The subjects of LAYOUTS[name] in `folder`, sorted; `names`: only these.

  Raises:
    UserError: no such benchmark, a missing prompt list, a subject without pictures or class, a file
      that is no picture, or `names` that are not there.
  """
  if name not in LAYOUTS:
    raise UserError(f"--benchmark={name} is unknown; use one of {', '.join(LAYOUTS)}")
  root = Path(folder).expanduser()
  if not root.is_dir():
    raise UserError(f"--data={folder} is no folder; give that of the benchmark {name}")
  notes: list[str] = []
  subjects = sorted(LAYOUTS[name](root, notes), key=lambda subject: subject.name)
  unknown = set(names) - {subject.name for subject in subjects}
  if unknown:
    raise UserError(f"{root} has no subject {first_names(sorted(unknown))}; it has "
                    f"{first_names([subject.name for subject in subjects])}")
  subjects = [subject for subject in subjects if not names or subject.name in names]
  if not subjects:
    raise UserError(f"{root} has no subject; the layout of {name} is told in docs/benchmark.md")
  notes += _notes_of_pictures(subjects)
  return Benchmark(name, tuple(subjects), tuple(notes))


# ---- the layouts


def _dreambench(root: Path, notes: list[str]) -> list[Subject]:
  root = root / "dataset" if (root / "dataset" / _LIST).is_file() else root
  text = _text(root / _LIST, "the list of classes and prompts of github.com/google/dreambooth")
  classes, objects, live = _dreambench_list(text, root / _LIST)
  others = sorted(path.name for path in root.iterdir()
                  if path.is_dir() and path.name[0] != "." and path.name not in classes)
  if others:
    notes.append(f"folders that {_LIST} does not name are left out: {first_names(others)}")
  return [_subject(root / name, name, noun, live if noun in LIVE else objects)
          for name, noun in classes.items()]


def _dreambench_list(text: str, file: Path) -> tuple[dict[str, str], list[str], list[str]]:
  """Class of every subject, and the templates of objects and of live subjects with {} for it."""
  classes, lists, current = {}, {"object": [], "live": []}, None
  for line in map(str.strip, text.splitlines()):
    heading = re.fullmatch(r"(Object|Live Subject) Prompts", line)
    template = re.match(r"""(['"])(.*)\1\s*\.format\(""", line)
    if heading:
      current = "live" if heading[1] != "Object" else "object"
    elif template and current:
      # Without the unique token {0}, which only DreamBooth's own fine-tuning knows.
      words = re.sub(r"\{0\}\s*", "", template[2])
      lists[current].append(words.replace("{1}", "{}"))
    elif current is None and line.count(",") == 1 and line != "subject_name,class":
      name, noun = (part.strip() for part in line.split(","))
      classes[name] = noun
  missing = [what for what, found in (
    ("classes", classes), ("object prompts", lists["object"]),
    ("live subject prompts", lists["live"])) if not found]
  if missing:
    raise UserError(f"{file} has no {' and no '.join(missing)}; take the file as it is published "
                    "in github.com/google/dreambooth")
  return classes, lists["object"], lists["live"]


def _dreambench_plus(root: Path, notes: list[str]) -> list[Subject]:
  for part in ("images", "captions"):
    if not (root / part).is_dir():
      raise UserError(f"{root / part} is missing; give the folder data of DreamBench++, which has "
                      "images/ and captions/")
  files = {path.relative_to(root / "captions").with_suffix(""): path
           for path in sorted((root / "captions").rglob("*.txt"))}
  pictures = {path.relative_to(root / "images").with_suffix(""): path
              for path in sorted((root / "images").rglob("*")) if _is_picture(path)}
  for key in pictures.keys() - files.keys():
    raise UserError(f"{pictures[key]} has no prompt list {root / 'captions' / key}.txt; add it")
  subjects, without = [], []
  for key, file in files.items():
    if key not in pictures:
      raise UserError(f"the subject {key} has no pictures: {root / 'images' / key}.jpg is missing")
    noun, *prompts = [line.strip() for line in _text(file, "").splitlines() if line.strip()] or [""]
    name = "_".join((*key.parts, noun.lower().replace(" ", "_")))
    named = [prompt for prompt in prompts if _names(prompt, noun)]
    without += [f"{name}: {prompt}" for prompt in prompts if prompt not in named]
    if not prompts:
      raise UserError(f"{file} has no prompts; its first line is the subject, the others prompts")
    if named:
      found = tuple((EDITING, prompt) for prompt in named)
      subjects.append(_make(name, noun, [pictures[key]], (_plain(noun), *found)))
  if without:
    notes.append(f"{len(without)} prompts do not name their subject, so that S+ has no place in "
                 f"them; they are left out: {first_names(without, 2)}")
  return subjects


def _folder(root: Path, notes: list[str]) -> list[Subject]:
  shared = root / "prompts.txt"
  folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._")
  subjects = []
  for folder in folders:
    own = folder / "prompts.txt"
    file = own if own.is_file() else shared
    lines = _text(file, "a prompt a line, with {} for the class noun").splitlines()
    noun = _text(folder / "class.txt", "the subject's class noun, such as 'mug'").strip()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
      raise UserError(f"{file} has no prompts; write one a line, with {{}} for the class noun")
    for prompt in prompts:
      if prompt.count("{}") != 1:
        raise UserError(f"{file}: {prompt!r} has no place for the noun; write {{}} there, once")
    subjects.append(_subject(folder, folder.name, noun, prompts))
  return subjects


LAYOUTS: dict[str, Callable[[Path, list[str]], list[Subject]]] = {
  "dreambench": _dreambench, "dreambench_plus": _dreambench_plus, "folder": _folder}


# ---- parts


def _subject(folder: Path, name: str, noun: str, templates: Sequence[str]) -> Subject:
  files = sorted(filter(_is_picture, folder.iterdir())) if folder.is_dir() else []
  if not files:
    raise UserError(f"the subject {name} has no pictures in {folder}; add them, or take it out of "
                    "the list")
  prompts = tuple((EDITING, template.replace("{}", noun)) for template in templates)
  return _make(name, noun, files, (_plain(noun), *prompts))


def _make(name: str, noun: str, files: Sequence[Path], prompts) -> Subject:
  if not noun:
    raise UserError(f"the subject {name} has no class noun; name what it is, such as 'mug'")
  masks = tuple(next((file.with_name(f"{file.stem}_mask{suffix}") for suffix in _PICTURES
                      if file.with_name(f"{file.stem}_mask{suffix}").is_file()), None)
                for file in files)
  return Subject(name, noun, tuple(files), masks, tuple(dict.fromkeys(prompts)))


def _plain(noun: str) -> tuple[str, str]:
  return PLAIN, f"a photo of a {noun}"


def _names(prompt: str, noun: str) -> bool:
  words = r"\s+".join(map(re.escape, noun.split()))
  return bool(noun) and bool(re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE))


def _is_picture(path: Path) -> bool:
  return (path.suffix.lower() in _PICTURES and not path.stem.endswith("_mask")
          and path.name[0] != ".")


def _text(file: Path, what: str) -> str:
  if not file.is_file():
    raise UserError(f"{file} is missing{what and ': '}{what}; add it")
  try:
    return file.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _notes_of_pictures(subjects: Sequence[Subject]) -> list[str]:
  """Opens each header: a broken file is an error, a grey picture or a missing mask is told."""
  grey, whole = [], 0
  for subject in subjects:
    for file, mask in zip(subject.pictures, subject.masks, strict=True):
      try:
        with Image.open(file) as image:
          grey += [f"{subject.name}/{file.name}"] if image.mode in _GREY else []
          has_alpha = "A" in image.getbands() or "transparency" in image.info
      except (OSError, ValueError) as error:
        raise UserError(f"{file} is no picture that Pillow reads ({error}); replace it") from error
      whole += mask is None and not has_alpha
  notes = []
  if grey:
    notes.append(f"grey pictures are taken as RGB with three equal channels: {first_names(grey)}")
  if whole:
    notes.append(f"{whole} pictures have neither mask nor alpha channel: a reference among them is "
                 "shown whole, background included")
  return notes
