"""The copying scores (`metrics/copying.py`) of a benchmark's pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cc_jax.benchmark.drawing import Task
from cc_jax.benchmark.scoring import IMAGE, over_subjects, read_real, tasks_by_subject
from cc_jax.benchmark.subjects import PLAIN, Subject
from cc_jax.metrics.copying import background_copy, copy_score, pairs_within, pose_copy
from cc_jax.metrics.scorer import Scorer
from data_pipeline.images import read_pair


def copying(
  tasks: Sequence[Task], read: Callable[[Task], np.ndarray], scorers: Mapping[str, Scorer]
) -> dict[str, Any]:
  """Means over subjects by name, each with its interval; what no subject defines is left out.

  'copy score (DINO-I)', 'pose (...)': over subjects with two real pictures or more. 'background
  (...)': over those whose first picture has a mask. 'LPIPS between references': of the plain prompt
  on the same noise. 'LPIPS between seeds': diversity of one prompt and reference.
  """
  values: dict[str, list[float]] = {}
  subjects = tasks_by_subject(tasks)
  for kind in [kind for kind in scorers if kind in IMAGE]:
    backgrounds = _backgrounds(list(subjects), scorers[kind])
    for subject, indices in subjects.items():
      part = [tasks[index] for index in indices if tasks[index].reference == 0]
      drawn = scorers[kind].image_features([read(task) for task in part])
      views = scorers[kind].image_features([read_real(file) for file in subject.pictures])
      found = {"copy score": copy_score(drawn, views, 0), "pose": pose_copy(drawn, views, 0)}
      if subject in backgrounds:
        others = [row for other, row in backgrounds.items() if other != subject]
        found["background"] = background_copy(drawn, backgrounds[subject], np.array(others))
      for name, column in found.items():
        if not np.isnan(column).all():
          values.setdefault(f"{name} ({IMAGE[kind]})", []).append(float(np.nanmean(column)))
  if "lpips" in scorers:
    for indices in subjects.values():
      for name, value in _lpips([tasks[index] for index in indices], read, scorers["lpips"]):
        values.setdefault(name, []).append(value)
  return {name: over_subjects(column) for name, column in values.items()}


def _backgrounds(subjects: Sequence[Subject], scorer: Scorer) -> dict[Subject, np.ndarray]:
  """Features of each first picture with its subject in grey, where a mask says what that is."""
  known, pictures, masks = [], [], []
  for subject in subjects:
    file, mask_file = subject.pictures[0], subject.masks[0]
    pixels, mask = read_pair(file, mask_file, str(file), str(mask_file))
    if mask is None and pixels.shape[-1] == 4:
      mask = pixels[..., 3]
    # Transparent pixels often have no colours: only a mask's file leaves a background to see.
    if mask_file is not None and mask is not None and mask.min() < 255:
      known.append(subject)
      pictures.append(np.ascontiguousarray(pixels[..., :3]))
      masks.append(255 - mask)
  if not known:
    return {}
  return dict(zip(known, scorer.image_features(pictures, masks=masks, background="grey")))


def _lpips(tasks, read, scorer):
  """(name, mean distance) of one subject, where it has pairs."""
  plain = [task for task in tasks if task.kind == PLAIN]
  first = [task for task in tasks if task.reference == 0]
  for name, members, group in (
    ("LPIPS between references", plain, lambda task: (task.prompt, task.index)),
    ("LPIPS between seeds", first, lambda task: task.prompt)):
    pairs = list(pairs_within([group(task) for task in members]))
    if pairs:
      drawn = [read(task) for task in members]
      left, right = ([drawn[pair[side]] for pair in pairs] for side in (0, 1))
      yield name, float(scorer.pair_scores(left, right).mean())
