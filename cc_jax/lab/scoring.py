"""Draws trials and scores the pictures with the judge."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from cc_jax.lab import judge as judging
from cc_jax.lab.trials import _SEED, Interventions, Trials
from cc_jax.sampling.images import grid
from cc_jax.sampling.prompts import encode_prompts
from cc_jax.sampling.sampler import ImageSampler

SCORES = ("scene", "class_id", "color1", "color2", "pattern")


def subject_fidelity(reading: dict[str, np.ndarray], trials: Trials) -> np.ndarray:
  """Subject fidelity of each picture, [n]: the share of visible intrinsic factors that agree."""
  return judging.share(judging.agreement(reading, trials.factors, trials.seen))


def text_control(reading: dict[str, np.ndarray], trials: Trials) -> np.ndarray:
  """Text control of each picture, [n]: the share of what the prompt asks for that is there."""
  return judging.share(prompt_agreement(reading, trials))


def prompt_agreement(reading: dict[str, np.ndarray], trials: Trials) -> dict[str, np.ndarray]:
  """Per context factor, float [n]: 1 where it is as the prompt asks, NaN where it asks nothing."""
  asked = dict(scene=trials.scenes, style=trials.styles, hat=trials.hats)
  named = dict(scene=np.ones(len(trials.scenes), bool), style=trials.styles > 0,
               hat=(trials.hats > 0) & trials.seen["hat"])  # its colour does not show in a sketch
  return judging.agreement(reading, asked, named, judging.CONTEXT)


def score_images(images: UInt8[np.ndarray, "n h w 3"], trials: Trials, judge) -> dict[str, float]:
  """What the judge finds: shares of agreement, and correlations with the reference.

  fidelity, control: the means of `identity` and `control`; scene: with the prompt; class_id,
  color1, color2, pattern: with the reference, where visible; copied_size, copied_x, copied_y:
  correlation with the reference's (0 is what one wants, but for what the class alone implies:
  compare with the base's).
  """
  reading = judging.read(judge, images)
  scores = {"fidelity": float(np.nanmean(subject_fidelity(reading, trials))),
            "control": float(np.nanmean(text_control(reading, trials))),
            "scene": float(np.mean(reading["scene"] == trials.scenes))}
  for name in SCORES[1:]:
    seen = trials.seen[name]
    scores[name] = float(np.mean((reading[name] == getattr(trials.factors, name))[seen]))
  for name in judging.CONTINUOUS:
    truth = getattr(trials.factors, name)
    scores[f"copied_{name}"] = float(np.corrcoef(reading[name], truth)[0, 1])
  return scores


def draw_trials(sampler: ImageSampler, tokenizers, trials: Trials | Interventions, settings, *,
                s_words: int, scale: float, batch_size: int, progress: bool = True,
                params=None) -> np.ndarray | dict[str, np.ndarray]:
  """One picture per trial, uint8 [n, h, w, 3]; `scale` 0 is the base, on the same noise.

  Of interventions, one for each of their references, under the same names, on the same noise.
  `params`: in place of the sampler's own.
  """
  if isinstance(trials, Interventions):
    names, count = list(trials.references), len(trials.references)
    trials = trials._replace(
      references=np.concatenate(list(trials.references.values())),
      prompts=trials.prompts * count, nouns=trials.nouns * count)
    seeds = list(range(_SEED, _SEED + len(trials.prompts) // count)) * count
  else:
    names, seeds = None, range(_SEED, _SEED + len(trials.prompts))
  subject = scale > 0 and sampler.is_subject_model
  prompts = encode_prompts(
    tokenizers, trials.prompts, trials.nouns if subject else None, s_words=s_words)
  apart = settings.image_guidance
  images, _ = sampler(
    prompts,
    encode_prompts(tokenizers, [""]),
    noise=sampler.noise(seeds),
    references=trials.references[:, None] if subject else None,
    scale=scale,
    guidance=settings.guidance,
    image_guidance=apart if apart >= 0 and subject else None,
    steps=settings.steps,
    sampler=settings.sampler,
    batch_size=batch_size,
    progress=progress,
    params=params,
  )
  if names is None:
    return images
  return dict(zip(names, images.reshape(len(names), -1, *images.shape[1:])))


def contact_sheet(trials: Trials, images: np.ndarray, count: int, *, title: str = ""):
  """References above, what was drawn from them below, the prompt under each."""
  columns = min(10, count)
  cells, captions = [], []
  for start in range(0, count, columns):
    rows = range(start, min(start + columns, count))
    empty = [None] * (columns - len(rows))
    cells += [trials.references[i] for i in rows] + empty + [images[i] for i in rows] + empty
    captions += [""] * columns + [trials.prompts[i] for i in rows] + [""] * len(empty)
  return grid(cells, captions, columns=columns, scale=1.5, title=title)


def format_scores(scores: dict[str, float]) -> str:
  """Scores on one line."""
  return "  ".join(f"{name.removesuffix('_id')} {value:+.2f}" if name.startswith("copied")
                   else f"{name.removesuffix('_id')} {100 * value:.0f} %"
                   for name, value in scores.items())
