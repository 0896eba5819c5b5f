"""What is to be drawn, and drawing it: each picture once, resumable, on all devices."""

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cc_jax.benchmark.subjects import PLAIN, Subject
from cc_jax.errors import UserError
from cc_jax.sampling.images import METADATA, save
from cc_jax.sampling.pipeline import Pipeline
from cc_jax.sampling.prompts import encode_prompts, encode_with_negative

# (tasks) -> pictures uint8 [h, w, 3]
Drawer = Callable[[Sequence["Task"]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Task:
  """A picture to draw: number `index` of a prompt, from the subject's real picture `reference`."""

  subject: Subject
  kind: str
  prompt: str
  index: int
  reference: int = 0

  @property
  def seed(self) -> int:
    """A hash of (subject, prompt, index): a part of the benchmark draws the same pictures.

    The reference does not count: two references of a subject are compared on the same noise.
    """
    text = json.dumps([self.subject.name, self.prompt, self.index])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

  @property
  def file(self) -> str:
    """The picture's path in the folder of pictures."""
    words = re.sub(r"\W+", "_", self.prompt.lower()).strip("_")[:40]
    digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
    return f"{self.subject.name}/{words}-{digest}-{self.index}-ref{self.reference}.png"


def make_tasks(subjects: Sequence[Subject], *, count: int, references: int = 1) -> list[Task]:
  """`count` pictures a prompt from the first real picture; of further references the plain prompt.

  Args:
    references: of how many real pictures of a subject the plain prompt is drawn (for copying).
  """
  tasks = []
  for subject in subjects:
    for kind, prompt in subject.prompts:
      shown = min(references, len(subject.pictures)) if kind == PLAIN else 1
      tasks += [Task(subject, kind, prompt, index, reference)
                for reference in range(shown) for index in range(count)]
  return tasks


def check_prompts(tasks: Sequence[Task], tokenizers: Sequence[Any], s_words: int) -> None:
  """Raises DataError for a prompt over the limit, or without its noun, before anything is drawn."""
  pairs = dict.fromkeys((task.prompt, task.subject.noun) for task in tasks)
  for prompt, noun in pairs:
    encode_prompts(tokenizers, [prompt], [noun], s_words=s_words)


def draw_missing(
  tasks: Sequence[Task], folder: Path, draw: Drawer, settings: Mapping[str, Any], *,
  batch_size: int, progress: bool = True,
) -> int:
  """Draws what `folder` lacks, a batch at a time; each picture is written once, whole or not.

  Args:
    settings: of the run (checkpoints, steps ...); a picture carries them with its own.

  Returns the number drawn. Raises UserError: a picture that is there was drawn otherwise.
  """
  missing = []
  for task in tasks:
    wanted, found = _carried(task, settings), _settings_of(folder / task.file)
    if found is None:
      missing.append(task)
    elif found != wanted:
      keys = [key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)]
      raise UserError(f"{folder / task.file} was drawn with another {', '.join(sorted(keys))}; "
                      "give another --workdir, or remove the folder")
  with tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc="drawing", unit="picture",
            disable=not progress) as bar:
    for start in range(0, len(missing), batch_size):
      part = missing[start : start + batch_size]
      for task, pixels in zip(part, draw(part), strict=True):
        save(Image.fromarray(np.asarray(pixels)), folder / task.file, _carried(task, settings))
      bar.update(len(part))
  return len(missing)


def pipeline_drawer(
  pipe: Pipeline, *, batch_size: int, guidance: float, image_guidance: float | None, steps: int,
  scale: float, sampler: str = "default",
) -> Drawer:
  """Draws with a pipeline, in batches of one compiled shape."""
  shown: dict[Path, np.ndarray] = {}  # of the subject in hand: tasks come subject by subject

  def reference(task: Task) -> np.ndarray:
    file, mask = task.subject.pictures[task.reference], task.subject.masks[task.reference]
    if file not in shown:
      with warnings.catch_warnings():  # without mask: told once for all, in the benchmark's notes
        warnings.filterwarnings("ignore", message=".* is used whole, background included")
        picture = pipe.read_references([file], [mask] if mask else None)
      if len(shown) > 64:
        shown.clear()
      shown[file] = picture
    return shown[file]

  def draw(tasks: Sequence[Task]) -> Sequence[np.ndarray]:
    nouns = [task.subject.noun for task in tasks]
    prompts = encode_with_negative(pipe.base, [task.prompt for task in tasks],
                                   nouns if pipe.adapter else None, s_words=pipe.s_words)
    references = np.stack([reference(task) for task in tasks]) if pipe.adapter else None
    images, _ = pipe.sampler(
      *prompts, noise=pipe.sampler.noise([task.seed for task in tasks]), references=references,
      scale=scale, guidance=guidance, image_guidance=image_guidance, steps=steps, sampler=sampler,
      batch_size=batch_size)
    return images

  return draw


def file_hash(file: Path | None) -> str:
  """sha256 of a file, 16 hex digits; '' for None."""
  return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _carried(task: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
  subject, at = task.subject, task.reference
  return dict(settings) | dict(
    subject=subject.name, noun=subject.noun, prompt=task.prompt, seed=task.seed,
    reference=file_hash(subject.pictures[at]), mask=file_hash(subject.masks[at]))


def _settings_of(file: Path) -> dict[str, Any] | None:
  """What a picture carries; None: it is not there."""
  if not file.is_file():
    return None
  try:
    with Image.open(file) as image:
      image.load()
      return json.loads(image.text[METADATA])
  except (OSError, SyntaxError, KeyError, AttributeError, ValueError) as error:
    raise UserError(f"{file} is no picture of this benchmark ({error}); remove it") from error
