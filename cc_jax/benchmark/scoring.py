"""Scores of drawn pictures against the real ones: per picture, their means, and the ceiling."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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
  tasks: Sequence[Task], drawn: Sequence[np.ndarray], scorers: Mapping[str, Scorer]
) -> list[dict[str, float]]:
  """Of every picture its scores by name; 'CLIP-I' is the mean over the real pictures, 'CLIP-I min'
  the smallest, 'CLIP-I reference' that of the reference shown (the first's copying is not hidden).
  """
  rows: list[dict[str, float]] = [{} for _ in tasks]
  by_subject: dict[Subject, list[int]] = {}
  for index, task in enumerate(tasks):
    by_subject.setdefault(task.subject, []).append(index)
  for kind, scorer in scorers.items():
    if kind in IMAGE:
      features = scorer.image_features(drawn)
      for subject, indices in by_subject.items():
        real = scorer.image_features([read_real(file) for file in subject.pictures])
        for index, values in zip(indices, cosine(features[indices], real), strict=True):
          name, shown = IMAGE[kind], tasks[index].reference
          rows[index] |= {name: float(values.mean()), f"{name} min": float(values.min()),
                          f"{name} reference": float(values[shown])}
    if kind == "clip":
      texts = list(dict.fromkeys(task.prompt for task in tasks))
      table = cosine(features, scorer.text_features(texts))
      for index, task in enumerate(tasks):
        rows[index]["CLIP-T"] = float(table[index, texts.index(task.prompt)])
    if kind == "imagereward":
      for row, value in zip(rows, scorer.reward([task.prompt for task in tasks], drawn)):
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
  return {name: _over_subjects(column) for name, column in values.items()}


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
        found[f"{kind} {name}"] = _over_subjects([float(np.mean(v)) for v in means.values()])
  return found


def _over_subjects(values: Sequence[float]) -> dict[str, Any]:
  interval: Interval = hierarchical_bootstrap(np.asarray([values], np.float64))
  return dict(mean=interval.mean, low=interval.low, high=interval.high, subjects=len(values))
