"""Scores of drawn pictures against the real ones: per picture, their means, and the ceiling."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cc_jax.benchmark.drawing import Task
from cc_jax.benchmark.subjects import EDITING, PLAIN, Subject
from cc_jax.metrics.scorer import Scorer, cosine
from cc_jax.metrics.statistics import Interval, hierarchical_bootstrap
from data_pipeline.images import read_image

IMAGE = {"clip": "CLIP-I", "dino": "DINO-I", "dinov2": "DINOv2-I", "dinov3": "DINOv3-I"}
TEXT = {"clip": "CLIP-T", "imagereward": "ImageReward"}


def read_real(file: Path) -> np.ndarray:
  """A real picture as the scorers get it: whole, upright, RGB on white."""
  pixels = read_image(file)
  if pixels.shape[-1] == 4:
    image = Image.fromarray(pixels)
    pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))
  return np.ascontiguousarray(pixels[..., :3])


def score_tasks(
  tasks: Sequence[Task], read: Callable[[Task], np.ndarray], scorers: Mapping[str, Scorer], *,
  progress: bool = False,
) -> list[dict[str, float]]:
  """Of every picture its scores by name, a subject at a time.

  'CLIP-I' is the mean over all real pictures of the subject, the reference among them, 'CLIP-I min'
  the smallest, 'CLIP-I reference' that of the reference shown.

  Args:
    read: a task's picture, uint8 [h, w, 3].
  """
  rows: list[dict[str, float]] = [{} for _ in tasks]
  with tqdm(total=len(tasks), desc="scoring", unit="picture", disable=not progress) as bar:
    for indices in tasks_by_subject(tasks).values():
      part = [tasks[index] for index in indices]
      found = _score_subject(part, [read(task) for task in part], scorers)
      for index, row in zip(indices, found, strict=True):
        rows[index] = row
      bar.update(len(part))
  return rows


def tasks_by_subject(tasks: Sequence[Task]) -> dict[Subject, list[int]]:
  """Subject -> the places of its tasks."""
  found: dict[Subject, list[int]] = {}
  for index, task in enumerate(tasks):
    found.setdefault(task.subject, []).append(index)
  return found


def _score_subject(tasks, drawn, scorers) -> list[dict[str, float]]:
  rows: list[dict[str, float]] = [{} for _ in tasks]
  real = [read_real(file) for file in tasks[0].subject.pictures]
  prompts = [task.prompt for task in tasks]
  for kind, scorer in scorers.items():
    if kind in IMAGE:
      name, features = IMAGE[kind], scorer.image_features(drawn)
      for row, task, values in zip(rows, tasks, cosine(features, scorer.image_features(real))):
        row |= {name: float(values.mean()), f"{name} min": float(values.min()),
                f"{name} reference": float(values[task.reference])}
    if kind == "clip":
      texts = list(dict.fromkeys(prompts))
      table = cosine(features, scorer.text_features(texts))
      for index, (row, prompt) in enumerate(zip(rows, prompts)):
        row["CLIP-T"] = float(table[index, texts.index(prompt)])
    if kind == "imagereward":
      for row, value in zip(rows, scorer.reward(prompts, drawn)):
        row["ImageReward"] = float(value)
  return rows


def ceiling(subjects: Sequence[Subject], scorers: Mapping[str, Scorer]) -> dict[str, Any]:
  """Real against real: the mean over pairs of different pictures of a subject, over subjects.

  The real pictures against the plain prompt, for text. Subjects with one picture have no pair.
  """
  values: dict[str, list[float]] = {}
  for subject in subjects:
    real = [read_real(file) for file in subject.pictures]
    plain = next(prompt for kind, prompt in subject.prompts if kind == PLAIN)
    for kind, scorer in scorers.items():
      features = scorer.image_features(real) if kind in IMAGE else None
      if kind in IMAGE and len(real) > 1:
        pairs = cosine(features, features)[~np.eye(len(real), dtype=bool)]
        values.setdefault(IMAGE[kind], []).append(float(pairs.mean()))
      if kind == "clip":
        text = cosine(features, scorer.text_features([plain]))
        values.setdefault("CLIP-T", []).append(float(text.mean()))
      if kind == "imagereward":
        reward = scorer.reward([plain] * len(real), real)
        values.setdefault("ImageReward", []).append(float(np.mean(reward)))
  return {name: over_subjects(column) for name, column in values.items()}


def summary(tasks: Sequence[Task], rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
  """'R CLIP-I' ... and their intervals: means of each subject's mean, subjects drawn anew.

  Pictures of further references are for copying alone and do not count.
  """
  found = {}
  names = list(dict.fromkeys(name for row in rows for name in row))
  for kind in (PLAIN, EDITING):
    for name in names:
      means: dict[str, list[float]] = {}
      for task, row in zip(tasks, rows, strict=True):
        if task.kind == kind and task.reference == 0 and name in row:
          means.setdefault(task.subject.name, []).append(row[name])
      if means:
        found[f"{kind} {name}"] = over_subjects([float(np.mean(v)) for v in means.values()])
  return found


def over_subjects(values: Sequence[float]) -> dict[str, Any]:
  """The mean over subjects and its 95 % bootstrap interval."""
  interval: Interval = hierarchical_bootstrap(np.asarray([values], np.float64))
  return dict(mean=interval.mean, low=interval.low, high=interval.high, subjects=len(values))
