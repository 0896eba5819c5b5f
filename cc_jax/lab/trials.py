"""Subjects that training never saw, with references and prompts to score an adapter by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from cc_jax.errors import UserError
from cc_jax.lab import judge as judging
from cc_jax.lab import leakage
from data_pipeline.subjects3d import factors as world
from data_pipeline.subjects3d.bulk import render_many
from data_pipeline.subjects3d.captions import caption
from data_pipeline.triples import TripleConfig, show_reference

SEED = 20_000  # of trials and their noise


class Trials(NamedTuple):
  """n subjects, one reference and one prompt each.

  The prompt's scene differs from the reference's. A score counts a factor only in the trials where
  it is `visible`, in the reference and in what the prompt asks for.
  """

  references: UInt8[np.ndarray, "n h w 3"]  # as the adapter gets them, usually on white
  prompts: tuple[str, ...]
  nouns: tuple[str, ...]
  scenes: np.ndarray  # [n], of the prompts
  styles: np.ndarray  # [n], of the prompts; 0 = none is asked for
  hats: np.ndarray  # [n], of the prompts, 1 + colour; 0 = none is asked for
  factors: world.Factors  # of the references
  visible: dict[str, np.ndarray]  # factor -> bool [n]

  def first(self, count: int) -> Trials:
    """The first `count` of them."""
    return Trials(*(column[:count] for column in self[:6]), self.factors.take(slice(count)),
                  {name: column[:count] for name, column in self.visible.items()})


def check_split(split: str) -> None:
  """Raises UserError for a split that subjects3d lacks."""
  if split not in world.SPLITS:
    raise UserError(f"--split={split} is unknown; use one of {', '.join(world.SPLITS)}")


def make_trials(split: str, count: int, *, ratio: float = 0.8, size: int = 64,
                layout: str = "centred", styled: int = 0, hatted: int = 0,
                rounds: int = 1) -> Trials:
  """`count` subjects of a split, as evenly over the classes as possible; always the same ones.

  Args:
    rounds: how often each subject comes, every time with another reference and prompt: the trials
      of one round after those of another, [rounds * count]. The first is the same with any number.
    ratio, size, layout: how references are shown (`cc_jax.sampling.images.reference_display`).
    styled: every so many prompts, one asks for a sketch or a watercolour besides; 0 = none.
    hatted: every so many prompts, one asks for a hat of some colour besides, which no reference
      wears; 0 = none.

  Raises:
    UserError: the split has fewer subjects.
  """
  display = dict(ratio=ratio, size=size, layout=layout)
  parts = [_make_round(split, count, index, styled, hatted, display) for index in range(rounds)]
  *columns, factors, visible = zip(*parts)
  joined = [sum(column, ()) if isinstance(column[0], tuple) else np.concatenate(column)
            for column in columns]
  return Trials(*joined, world.concatenate(factors),
                {name: np.concatenate([part[name] for part in visible]) for name in visible[0]})


def _make_round(split: str, count: int, index: int, styled: int, hatted: int,
                display: dict) -> Trials:
  """The trials of one round of `make_trials`."""
  factors, rng = reference_factors(split, count, index)
  numbers = np.arange(index, index + count)  # every round asks other things of a subject
  rendered = render_many(factors, resolution=display["size"], progress=False)
  scenes = (factors.scene + rng.integers(1, len(world.SCENES), count)) % len(world.SCENES)
  styles = np.zeros(count, np.int32)
  if styled:
    styles = np.where(numbers % styled == 0, 1 + numbers // styled % (len(world.STYLES) - 1), 0)
  hats = np.zeros(count, np.int32)
  if hatted:  # in the main colour it would be hard to see
    other = (factors.color1 + rng.integers(1, len(world.COLORS), count)) % len(world.COLORS)
    hats = np.where(numbers % hatted == hatted - 1, 1 + other, 0)
  requested = factors._replace(scene=scenes.astype(factors.scene.dtype),
                               style=styles.astype(factors.style.dtype),
                               hat=hats.astype(factors.hat.dtype))
  mentions = [("scene", *(["hat"] if hat else []), *(["style"] if style else []))
              for hat, style in zip(hats, styles)]
  prompts = [caption(rng, requested.take(i), mention=mentions[i]).text for i in range(count)]
  return Trials(
    references=show_references(rendered, **display), prompts=tuple(prompts),
    nouns=tuple(world.CLASSES[c] for c in factors.class_id), scenes=scenes, styles=styles,
    hats=hats, factors=factors, visible=judging.visible(requested, rendered.coverage))


def reference_factors(
  split: str, count: int, round_index: int = 0
) -> tuple[world.Factors, np.random.Generator]:
  """The factors of one round's references, and the generator of the round's further draws."""
  subjects, rng = choose_subjects(split, count)
  if round_index:
    rng = _generator(1000 * round_index + world.SPLITS.index(split))
  return world.sample_factors(rng, subjects, hat=0, style=0), rng


def choose_subjects(split: str, count: int) -> tuple[world.Subjects, np.random.Generator]:
  """`count` subjects of a split, as evenly over the classes as possible, and a generator.

  Always the same ones: fewer are the first of more. Raises UserError if there are not so many.
  """
  table = world.subjects(split)
  if not 1 <= count <= len(table.subject_id):
    raise UserError(f"{count} subjects asked for; {split} has 1 to {len(table.subject_id)}")
  rng = _generator(world.SPLITS.index(split))
  order = rng.permutation(len(table.subject_id))
  rank = np.zeros_like(order)  # of a subject among its class, in random order
  for class_id in range(len(world.CLASSES)):
    members = order[table.class_id[order] == class_id]
    rank[members] = np.arange(len(members))
  return table.take(np.lexsort((table.class_id, rank))[:count]), rng


def _generator(stream: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(key=[SEED, stream]))


def show_references(
  rendered, *, ratio: float, size: int, layout: str
) -> UInt8[np.ndarray, "n s s 3"]:
  """Rendered pictures (`data_pipeline.subjects3d.renderer.Rendered`) as references.

  `ratio`, `size`, `layout`: see `make_trials`; 'random' is shown in place, so nothing is random.
  """
  config = TripleConfig(size, ratio, reference_layout="in_place" if layout == "random" else layout)
  middle = np.full(3, 0.5)
  pairs = zip(rendered.image, rendered.mask)
  return np.stack([show_reference(image, mask, config, middle) for image, mask in pairs])


class Interventions(NamedTuple):
  """n subjects, each shown in several references that differ in one irrelevant factor."""

  references: dict[str, UInt8[np.ndarray, "n h w 3"]]  # 'start' and the names of the moves
  prompts: tuple[str, ...]
  nouns: tuple[str, ...]
  factors: world.Factors  # of the references at the start


def make_interventions(
  split: str, count: int, *, moves: Sequence[str] = tuple(leakage.MOVES), ratio: float = 0.8,
  size: int = 64, layout: str = "in_place",
) -> Interventions:
  """`count` subjects, the same as those of `make_trials`, for `leakage.measure`.

  The prompt's scene is one that no reference shows. Raises UserError as `make_trials` does.
  """
  subjects, rng = choose_subjects(split, count)
  start = leakage.start(rng, subjects)
  views = {"start": start} | {name: leakage.moved(start, name) for name in moves}
  rendered = render_many(world.concatenate(list(views.values())), resolution=size, progress=False)
  shown = show_references(rendered, ratio=ratio, size=size, layout=layout)
  requested = start._replace(scene=leakage.asked_scene(rng, start).astype(start.scene.dtype))
  prompts = [caption(rng, requested.take(i), mention=("scene",)).text for i in range(count)]
  return Interventions(
    references=dict(zip(views, shown.reshape(len(views), count, *shown.shape[1:]))),
    prompts=tuple(prompts), nouns=tuple(world.CLASSES[c] for c in start.class_id), factors=start)


def base_prompts(count: int) -> tuple[list[str], world.Factors]:
  """`count` prompts of class, main colour and scene, for the base alone, and what they ask for.

  Each value comes about equally often.
  """
  rng = _generator(9)
  table = world.subjects("train")
  factors = world.sample_factors(
    rng, table.take(rng.integers(0, len(table.subject_id), count)), hat=0, style=0)
  n = np.arange(count)
  spread = dict(class_id=n % len(world.CLASSES), color1=rng.permutation(n) % len(world.COLORS),
                scene=rng.permutation(n) % len(world.SCENES))
  factors = factors._replace(**{k: v.astype(np.int32) for k, v in spread.items()})
  texts = [caption(rng, factors.take(i), mention=("scene", "color1")).text for i in range(count)]
  return texts, factors
