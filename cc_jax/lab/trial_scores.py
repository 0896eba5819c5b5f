"""Draws trials and scores the images with the judge: an adapter beside its base, or the base."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from cc_jax.bases.base import Base
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.lab import judge as judging
from cc_jax.lab.trials import SEED, Interventions, Trials, base_prompts
from cc_jax.sampling.images import grid, save
from cc_jax.sampling.prompts import encode_with_negative
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler

GRID_SUBJECTS = 20
SCORES = ("scene", "class_id", "color1", "color2", "pattern")


def subject_fidelity(reading: dict[str, np.ndarray], trials: Trials) -> np.ndarray:
  """Subject fidelity of each picture, [n]: the share of visible intrinsic factors that agree."""
  return judging.share(judging.agreement(reading, trials.factors, trials.visible))


def text_control(reading: dict[str, np.ndarray], trials: Trials) -> np.ndarray:
  """Text control of each picture, [n]: the share of what the prompt asks for that is there."""
  return judging.share(prompt_agreement(reading, trials))


def prompt_agreement(reading: dict[str, np.ndarray], trials: Trials) -> dict[str, np.ndarray]:
  """Per context factor, float [n]: 1 where it is as the prompt asks, NaN where it asks nothing."""
  requested = dict(scene=trials.scenes, style=trials.styles, hat=trials.hats)
  # A sketch does not show the hat's colour.
  named = dict(scene=np.ones(len(trials.scenes), bool), style=trials.styles > 0,
               hat=(trials.hats > 0) & trials.visible["hat"])
  return judging.agreement(reading, requested, named, judging.CONTEXT)


def score_images(images: UInt8[np.ndarray, "n h w 3"], trials: Trials, judge) -> dict[str, float]:
  """What the judge finds: shares of agreement, and correlations with the reference.

  fidelity, control: the means of `subject_fidelity` and `text_control`; scene: with the prompt;
  class_id, color1, color2, pattern: with the reference, where visible; copied_size, copied_x,
  copied_y: correlation with the reference's (ideally as small as the base's: the class alone
  implies some). What too few pictures do not define is left out.
  """
  reading = judging.read(judge, images)
  scores = {"fidelity": float(np.nanmean(subject_fidelity(reading, trials))),
            "control": float(np.nanmean(text_control(reading, trials))),
            "scene": float(np.mean(reading["scene"] == trials.scenes))}
  for name in SCORES[1:]:
    agrees = reading[name] == getattr(trials.factors, name)
    if trials.visible[name].any():
      scores[name] = float(np.mean(agrees[trials.visible[name]]))
  for name in judging.CONTINUOUS:
    truth = getattr(trials.factors, name)
    if min(np.ptp(reading[name]), np.ptp(truth)) > 0:
      scores[f"copied_{name}"] = float(np.corrcoef(reading[name], truth)[0, 1])
  return scores


def draw_trials(sampler: ImageSampler, base: Base, trials: Trials | Interventions, settings, *,
                s_words: int, scale: float, batch_size: int, progress: bool = True,
                params=None) -> np.ndarray | dict[str, np.ndarray]:
  """One image per trial, uint8 [n, h, w, 3]; `scale` 0 is the base, on the same noise.

  Of interventions, one for each of their references, under the same names, on the same noise.
  `settings`: guidance, image_guidance (negative = none of its own), steps and sampler, as in
  config.sample. `params`: in place of the sampler's own.
  """
  names, references, repeats = None, trials.references, 1
  if isinstance(trials, Interventions):
    names, repeats = list(references), len(references)
    references = np.concatenate(list(references.values()))
  prompts, nouns = trials.prompts * repeats, trials.nouns * repeats
  seeds = list(range(SEED, SEED + len(trials.prompts))) * repeats
  with_subject = scale > 0 and sampler.is_subject_model
  separate = with_subject and settings.image_guidance >= 0
  images, _ = sampler(
    *encode_with_negative(base, prompts, nouns if with_subject else None, s_words=s_words),
    noise=sampler.noise(seeds), references=references[:, None] if with_subject else None,
    scale=scale, guidance=settings.guidance,
    image_guidance=settings.image_guidance if separate else None, steps=settings.steps,
    sampler=settings.sampler, batch_size=batch_size, progress=progress, params=params)
  if names is None:
    return images
  return dict(zip(names, images.reshape(len(names), -1, *images.shape[1:])))


def compare_with_base(trials: Trials, workdir, *, scale: float,
                      **options: Any) -> dict[str, dict[str, float]]:
  """Draws all trials with the adapter and with the base; scores, prints and writes both.

  Fidelity over control is a point of the trade-off figure. `options`: of `draw_trials`.
  """
  judge, _ = judging.load_judge()  # before the drawing, which takes longer
  images = draw_trials(trials=trials, scale=scale, **options)
  base_images = draw_trials(trials=trials, scale=0.0, **options)
  scores = {"adapter": score_images(images, trials, judge),
            "base": score_images(base_images, trials, judge)}
  count = len(images)
  print(f"{count} unseen subjects, one reference each, 'a <class> <scene>':")
  for name, values in scores.items():
    print(f"  {name:8}{format_scores(values)}")
  folder = epath.Path(workdir)  # perhaps in a bucket
  save(contact_sheet(trials, images, min(GRID_SUBJECTS, count)), folder / "grid.png")
  (folder / "scores.json").write_text(json.dumps(dict(subjects=count, **scores), indent=2) + "\n")
  print(f"{folder / 'grid.png'}: references above, new pictures with their prompts below")
  return scores


def evaluate_base(base: Base, count: int, workdir, *, guidance: float, steps: int,
                  mesh: jax.sharding.Mesh, batch_size: int) -> dict[str, float]:
  """Scores the base on `count` prompts of class, main colour and scene; writes its images."""
  schedule = NoiseSchedule.from_config(base.scheduler_config)
  sampler = ImageSampler(bundle(base), schedule, mesh=mesh)
  texts, factors = base_prompts(count)
  images, _ = sampler(
    *encode_with_negative(base, texts),
    noise=sampler.noise(range(SEED, SEED + count)), guidance=guidance, steps=steps,
    batch_size=batch_size, progress=True)
  reading = judging.read(judging.load_judge()[0], images)
  scores = {name: float(np.mean(reading[name] == getattr(factors, name)))
            for name in ("class_id", "color1", "scene")}
  print(f"{base.name}, {count} prompts: {format_scores(scores)}")
  folder = epath.Path(workdir)
  save(grid(list(images[:60]), texts[:60], columns=10, scale=1.5), folder / "base.png")
  (folder / "base.json").write_text(json.dumps(dict(prompts=count, **scores), indent=2) + "\n")
  return scores


def contact_sheet(trials: Trials, images: np.ndarray, count: int) -> Image.Image:
  """References above, what was drawn from them below, the prompt under each."""
  columns = min(10, count)
  cells, captions = [], []
  for start in range(0, count, columns):
    rows = range(start, min(start + columns, count))
    empty = [None] * (columns - len(rows))
    cells += [trials.references[i] for i in rows] + empty + [images[i] for i in rows] + empty
    captions += [""] * columns + [trials.prompts[i] for i in rows] + [""] * len(empty)
  return grid(cells, captions, columns=columns, scale=1.5)


def format_scores(scores: dict[str, float]) -> str:
  """Scores on one line."""
  return "  ".join(f"{name.removesuffix('_id')} {value:+.2f}" if name.startswith("copied")
                   else f"{name.removesuffix('_id')} {100 * value:.0f} %"
                   for name, value in scores.items())
