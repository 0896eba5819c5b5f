"""All that the laboratory measures of one model: what it draws, what leaks, what its features know.

A `Scorer` belongs to one run and scores it at every checkpoint; its scores go into the run's result
file as they are. Runs of one process share what is rendered and compiled where they are alike.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from cc_jax.bases.base import Base
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.lab import judge as judge_lib
from cc_jax.lab import leakage
from cc_jax.lab.trial_scores import draw_trials, prompt_agreement, subject_fidelity, text_control
from cc_jax.lab.trials import (
  Interventions,
  Trials,
  choose_subjects,
  make_interventions,
  make_trials,
  show_references,
)
from cc_jax.metrics import features
from cc_jax.metrics.statistics import mean_of_known, nan_for_none
from cc_jax.parallel.mesh import batch_sharding, make_mesh, pad_batch
from cc_jax.sampling.images import reference_display
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler
from data_pipeline.subjects3d import factors as world
from data_pipeline.subjects3d.bulk import render_many

ON_THE_WAY = ("size", "place")  # moves that are drawn at every checkpoint
LABELS = ("class_id", "color1", "color2", "pattern", "pattern_color", "scene")
NUMBERS = ("wide", "tall", "ratio", "size", "x", "y", "elevation", "roll", "light_azimuth")
_SEED = 30_000  # of the views whose features are scored
_SAMPLERS: dict[Any, ImageSampler] = {}  # by the model's structure; they hold no parameters
# All runs are scored on the same pictures, unless they show references in ways of their own.
_trials = functools.lru_cache(4)(make_trials)
_interventions = functools.lru_cache(4)(make_interventions)


class Scorer:
  """Scores one run's model, again and again."""

  def __init__(self, config: ml_collections.ConfigDict, base: Base):
    """`config`: the laboratory's, with the arm's changes in `run`."""
    self.run, self.score, self.base = config.run, config.score, base
    self.mesh = make_mesh(self.run.mesh, self.run.train.batch_size)
    self.judge, _ = judge_lib.load_judge()
    self.shown = reference_display(self.run.data)

  @property
  def trials(self) -> Trials:
    score = self.score
    return _trials(score.split, score.subjects, styled=score.styled, hatted=score.hatted,
                   rounds=score.rounds, **self.shown)

  def draw(self, trials: Trials | Interventions, model: nnx.Module, scale: float = 1.0):
    """Pictures, as `draw_trials` returns them."""
    definition, params = nnx.split(model)
    key = self.base.hash, definition, self.mesh
    if key not in _SAMPLERS:
      schedule = NoiseSchedule.from_config(self.base.scheduler_config)
      _SAMPLERS[key] = ImageSampler(
        model, schedule, merge=lambda params: nnx.merge(definition, params), mesh=self.mesh)
    return draw_trials(
      _SAMPLERS[key], self.base, trials, self.run.sample, params=params, scale=scale,
      s_words=self.run.encoder.s_words, batch_size=self.score.batch, progress=False)

  def pictures(self, model: nnx.Module, trials: Trials, scale: float = 1.0) -> dict:
    """`subjects`: identity and control of each; `scores`: their means and those of each factor.

    Of several rounds `subjects` has each subject's mean, and `rounds` the rows of each round.
    """
    images = self.draw(trials, model, scale)
    reading = judge_lib.read(self.judge, images)
    rows = dict(fidelity=subject_fidelity(reading, trials),
                control=text_control(reading, trials))
    factors = judge_lib.agreement(reading, trials.factors, trials.visible)
    factors |= prompt_agreement(reading, trials)
    count = min(self.score.subjects, len(images))
    by_round = {name: row.reshape(-1, count) for name, row in rows.items()}
    result = dict(
      subjects={name: as_list(mean_of_known(row)) for name, row in by_round.items()},
      scores={name: mean(row) for name, row in (rows | factors).items()})
    if len(images) > count:
      result["rounds"] = [{name: as_list(row[number]) for name, row in by_round.items()}
                          for number in range(len(images) // count)]
    return result

  def leaks(self, model: nnx.Module, *, count: int | None = None, moves=None) -> dict:
    """Leakage of each subject, {factor: [n]}; of the first `count` subjects and some moves only."""
    first = slice(count)
    everything = _interventions(self.score.split, self.score.interventions, **self.shown)
    names = ["start", *(leakage.MOVES if moves is None else moves)]
    trials = Interventions(
      {name: everything.references[name][first] for name in names}, everything.prompts[first],
      everything.nouns[first], everything.factors.take(first))
    leaks = leakage.measure(self.judge, self.draw(trials, model), trials.references, trials.factors)
    return {name: as_list(row) for name, row in leaks.items()}

  def on_the_way(self, model: CustomContrast, step: int) -> dict:
    """A point of the curve over training."""
    scores = self.pictures(model, self.trials.first(self.score.curve_subjects))["scores"]
    leaks = self.leaks(model, count=self.score.curve_interventions, moves=ON_THE_WAY)
    return dict(step=step, fidelity=scores["fidelity"], control=scores["control"],
                leakage={name: mean(row) for name, row in leaks.items()})

  def last_point(self, scores: dict, step: int) -> dict:
    """The curve's last point, from the scores of `at_the_end`: the same subjects, not drawn again.
    """
    some, few = self.score.curve_subjects, self.score.curve_interventions
    means = {name: mean(row[:some]) for name, row in scores["subjects"].items()}
    leaks = {name: mean(scores["leakage"][name][:few]) for name in ON_THE_WAY
             if name in scores["leakage"]}
    return dict(step=step, **means, leakage=leaks)

  def at_the_end(self, model: CustomContrast, *, sweep: bool) -> dict:
    """Everything, of the trained model."""
    result = self.pictures(model, self.trials)
    result["leakage"] = self.leaks(model) if self.score.interventions else {}
    result["features"] = self.features(model) if self.score.probe_subjects else {}
    result["ridge_by"] = "folds"
    if sweep:
      some, result["sweep"] = self.trials.first(self.score.sweep_subjects), []
      for scale in self.score.sweep_scales:
        scores = self.pictures(model, some, scale)["scores"]
        result["sweep"].append(
          dict(scale=scale, fidelity=scores["fidelity"], control=scores["control"]))
    return result

  def features(self, model: CustomContrast) -> dict[str, dict[str, Any]]:
    """Per layer of S+ (and of the visual tokens, and of the frozen image encoder): what it knows.

    Distances, recall@1 from another view and the Spearman correlation with real similarity are of
    tokens averaged per picture; linear probes read all tokens of a layer.
    """
    score = self.score
    references, factors = make_views(
      score.split, score.probe_subjects, score.probe_views, **self.shown)
    pooled, flat = embed(model, references, score.timestep, batch=score.batch, mesh=self.mesh)
    subject = factors.subject_id
    fold = features.folds(subject)
    real = world.real_similarity(factors.take(np.unique(subject, return_index=True)[1]))
    front = judge_lib.has_front(factors)
    labels, numbers = ({name: getattr(factors, name) for name in names}
                       for names in (LABELS, NUMBERS))
    azimuth = {"azimuth": judge_lib.azimuth_bin(factors.azimuth[front])}
    scores = {}
    for name in pooled:
      if name.startswith("layer") and self.run.encoder.s_plus_space == "none":
        continue  # these tokens go nowhere
      probes = features.probes(flat[name], labels, numbers, fold)
      probes |= features.probes(flat[name][front], azimuth, {}, fold[front])
      scores[name] = rounded(dict(
        features.distances(pooled[name], subject),
        recall=features.recall_at_1(pooled[name], subject),
        spearman=features.likeness(pooled[name], subject, real),
        probes=probes))
    return scores


def of_base(config: ml_collections.ConfigDict, base: Base) -> dict:
  """What the base draws without adapter, on the same prompts and noise; it can leak nothing."""
  scorer = Scorer(config, base)
  return scorer.pictures(bundle(base), scorer.trials, 0.0) | dict(leakage={}, features={})


@functools.lru_cache(4)
def make_views(
  split: str, count: int, views: int, *, same: bool = False, ratio: float, size: int, layout: str,
) -> tuple[UInt8[np.ndarray, "n h w 3"], world.Factors]:
  """Several references of each subject, one after another, and their factors.

  `same`: view k shows all subjects alike (pose, place, size, light), for pictures in which a colour
  stands for a view. `ratio`, `size`, `layout`: see `trials.make_trials`.
  """
  subjects, rng = choose_subjects(split, count)
  rng = np.random.Generator(np.random.Philox(key=[_SEED, int(rng.integers(2**31))]))
  table = subjects.take(np.repeat(np.arange(count), views))
  factors = world.sample_factors(rng, table, hat=0, style=0)
  if same:
    irrelevant = world.Factors._fields[len(world.Subjects._fields):]
    factors = factors._replace(
      **{name: np.tile(getattr(factors, name)[:views], count) for name in irrelevant})
  rendered = render_many(factors, resolution=size, progress=False)
  return show_references(rendered, ratio=ratio, size=size, layout=layout), factors


def embed(
  model: CustomContrast, references: UInt8[np.ndarray, "n h w 3"], timestep: int, *,
  batch: int = 48, mesh: jax.sharding.Mesh | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Features of pictures: ({name: tokens averaged [n, d]}, {name: all tokens flat [n, q * d]}).

  Names: 'layer 1' ... 'layer G' are S+ (the textual tokens before any projection head, [R]),
  'visual' the visual tokens, 'image encoder' the last layer of the frozen features that they read,
  'image embedding' the g whose cosines are MACL's S.
  """
  definition, params = nnx.split(model)
  size = batch if mesh is None else -(-batch // mesh.size) * mesh.size
  rows: dict[str, list] = {}
  for start in range(0, len(references), size):
    chunk = references[start : start + size]
    pixels = pad_batch(chunk, size)
    if mesh is not None:
      pixels = jax.device_put(pixels, batch_sharding(mesh))
    textual, *others = jax.device_get(_tokens(definition, params, pixels, timestep))
    named = {f"layer {number}": layer for number, layer in enumerate(textual, 1)}
    named |= zip(("visual", "image encoder", "image embedding"), others)
    for name, value in named.items():
      rows.setdefault(name, []).append(np.asarray(value, np.float32)[: len(chunk)])
  tokens = {name: np.concatenate(parts) for name, parts in rows.items()}
  return ({name: x.mean(1) for name, x in tokens.items()},
          {name: x.reshape(len(x), -1) for name, x in tokens.items()})


@functools.partial(jax.jit, static_argnames="definition")
def _tokens(definition: nnx.GraphDef, params: Any, pixels: Any, timestep: Any):
  """(textual tokens per layer, visual tokens, the image encoder's last layer in use, embedding)."""
  model = nnx.merge(definition, params)
  seen, embedding = model.image_features(pixels.astype(jnp.float32) / 255)
  _, visual = model.visual(seen)
  _, textual = model.mfi_encoder.textual(seen, jnp.full(len(pixels), timestep))
  last = seen[..., -model.image_encoder.config.hidden_size :]
  return textual, visual, last, embedding[:, None]


def mean(values) -> float | None:
  """The mean of what is known (neither None nor NaN), four digits; None if nothing is."""
  values = nan_for_none(values)
  return None if np.isnan(values).all() else round(float(np.nanmean(values)), 4)


def as_list(values: np.ndarray) -> list[float | None]:
  """An array for JSON: four digits, None where a value is not known."""
  return [None if np.isnan(v) else round(float(v), 4) for v in values]


def rounded(tree: Any) -> Any:
  """All numbers of nested dicts with four digits."""
  if isinstance(tree, dict):
    return {key: rounded(value) for key, value in tree.items()}
  return round(float(tree), 4)
