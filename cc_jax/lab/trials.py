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

_SEED = 20_000  # of trials and their noise


class Trials(NamedTuple):
  """n subjects, one reference and one prompt each.

  The prompt's scene differs from the reference's. `seen` says per factor in which trials it can be
  seen, in the reference and in what the prompt asks for; a score counts only those.
  """

  references: UInt8[np.ndarray, "n h w 3"]  # as the adapter gets them, usually on white
  prompts: tuple[str, ...]
  nouns: tuple[str, ...]
  scenes: np.ndarray  # of the prompts
  styles: np.ndarray  # of the prompts; 0 = none is asked for
  hats: np.ndarray  # of the prompts, 1 + colour; 0 = none is asked for
  factors: world.Factors  # of the references
  seen: dict[str, np.ndarray]

  def first(self, count: int) -> Trials:
    """The first `count` of them."""
    cut = lambda x: x[:count]  # noqa: E731
    return Trials(*map(cut, self[:6]), self.factors.take(slice(count)),
                  {name: cut(column) for name, column in self.seen.items()})


def make_trials(split: str, count: int, *, share: float = 0.8, size: int = 64,
                place: str = "centred", styled: int = 0, hatted: int = 0,
                rounds: int = 1) -> Trials:
  """`count` subjects of a split, as evenly over the classes as it goes; always the same ones.

  Args:
    rounds: how often each subject comes, every time with another reference and prompt: the trials
      of one round after those of another, [rounds * count]. The first is the same with any number.
    share, size, place: how references are shown (config.data.reference_share, image_size and
      reference_place).
    styled: every so many prompts, one asks for a sketch or a watercolour besides; 0 = none.
    hatted: every so many prompts, one asks for a hat of some colour besides, which no reference
      wears; 0 = none.

  Raises:
    UserError: the split has fewer subjects.
  """
  parts = [_round(split, count, number, share=share, size=size, place=place, styled=styled,
                  hatted=hatted) for number in range(rounds)]
  *columns, factors, seen = zip(*parts)
  joined = [sum(column, ()) if isinstance(column[0], tuple) else np.concatenate(column)
            for column in columns]
  return Trials(*joined, world.concatenate(factors),
                {name: np.concatenate([one[name] for one in seen]) for name in seen[0]})


def _round(split: str, count: int, number: int, *, share: float, size: int, place: str,
           styled: int, hatted: int) -> Trials:
  """Round `number` of `make_trials`."""
  factors, rng = reference_factors(split, count, number)
  nth = np.arange(number, number + count)  # so that each subject is asked for other things
  rendered = render_many(factors, resolution=size, progress=False)
  scenes = (factors.scene + rng.integers(1, len(world.SCENES), count)) % len(world.SCENES)
  styles = np.zeros(count, np.int32)
  if styled:
    styles = np.where(nth % styled == 0, 1 + nth // styled % (len(world.STYLES) - 1), 0)
  hats = np.zeros(count, np.int32)
  if hatted:  # in the main colour it would be hard to see
    other = (factors.color1 + rng.integers(1, len(world.COLORS), count)) % len(world.COLORS)
    hats = np.where(nth % hatted == hatted - 1, 1 + other, 0)
  asked = factors._replace(scene=scenes.astype(factors.scene.dtype),
                           style=styles.astype(factors.style.dtype),
                           hat=hats.astype(factors.hat.dtype))
  mentions = [("scene", *(["hat"] if hat else []), *(["style"] if style else []))
              for hat, style in zip(hats, styles)]
  return Trials(
    references=show_references(rendered, share=share, size=size, place=place),
    prompts=tuple(caption(rng, asked.take(i), mention=mentions[i]).text for i in range(count)),
    nouns=tuple(world.CLASSES[c] for c in factors.class_id),
    scenes=scenes,
    styles=styles,
    hats=hats,
    factors=factors,
    seen=judging.visible(asked, rendered.coverage),
  )


def reference_factors(
  split: str, count: int, number: int = 0
) -> tuple[world.Factors, np.random.Generator]:
  """The references of a round of `make_trials` unrendered, and what to draw on with."""
  subjects, rng = choose_subjects(split, count)
  if number:
    rng = np.random.Generator(np.random.Philox(key=[_SEED, 1000 * number + _index(split)]))
  return world.sample_factors(rng, subjects, hat=0, style=0), rng


def choose_subjects(split: str, count: int) -> tuple[world.Subjects, np.random.Generator]:
  """`count` subjects of a split, as evenly over the classes as it goes, and what to draw on with.

  Always the same ones, and fewer are the first of more. Raises UserError if there are not so many.
  """
  table = world.subjects(split)
  if not 1 <= count <= len(table.subject_id):
    raise UserError(f"{count} subjects asked for; {split} has 1 to {len(table.subject_id)}")
  rng = np.random.Generator(np.random.Philox(key=[_SEED, _index(split)]))
  order = rng.permutation(len(table.subject_id))
  rank = np.zeros_like(order)  # of a subject among its class, in random order
  for class_id in range(len(world.CLASSES)):
    members = order[table.class_id[order] == class_id]
    rank[members] = np.arange(len(members))
  return table.take(np.lexsort((table.class_id, rank))[:count]), rng


def _index(split: str) -> int:
  return world.SPLITS.index(split)


def show_references(rendered, *, share: float, size: int, place: str) -> UInt8[np.ndarray, "n s s 3"]:
  """Rendered pictures (`data_pipeline.subjects3d.renderer.Rendered`) as references.

  `share`, `size`, `place`: see `make_trials`.
  """
  # Chance has no say here: what training showed anywhere is shown where it stands.
  config = TripleConfig(size, share, reference_place="in_place" if place == "random" else place)
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
  split: str, count: int, *, moves: Sequence[str] = tuple(leakage.MOVES), share: float = 0.8,
  size: int = 64, place: str = "in_place",
) -> Interventions:
  """`count` subjects, the same as those of `make_trials`, for `leakage.measure`.

  The prompt's scene is one that no reference shows. Raises UserError as `make_trials` does.
  """
  subjects, rng = choose_subjects(split, count)
  start = leakage.start(rng, subjects)
  views = {"start": start} | {name: leakage.moved(start, name) for name in moves}
  rendered = render_many(world.concatenate(list(views.values())), resolution=size, progress=False)
  shown = show_references(rendered, share=share, size=size, place=place)
  asked = start._replace(scene=leakage.asked_scene(rng, start).astype(start.scene.dtype))
  return Interventions(
    references=dict(zip(views, shown.reshape(len(views), count, *shown.shape[1:]))),
    prompts=tuple(caption(rng, asked.take(i), mention=("scene",)).text for i in range(count)),
    nouns=tuple(world.CLASSES[c] for c in start.class_id),
    factors=start,
  )


# ---- the base alone


def base_prompts(count: int) -> tuple[list[str], world.Factors]:
  """`count` prompts of class, main colour and scene, each value about equally often."""
  rng = np.random.Generator(np.random.Philox(key=[_SEED, 9]))
  table = world.subjects("train")
  factors = world.sample_factors(
    rng, table.take(rng.integers(0, len(table.subject_id), count)), hat=0, style=0)
  n = np.arange(count)
  spread = dict(class_id=n % len(world.CLASSES), color1=rng.permutation(n) % len(world.COLORS),
                scene=rng.permutation(n) % len(world.SCENES))
  factors = factors._replace(**{k: v.astype(np.int32) for k, v in spread.items()})
  texts = [caption(rng, factors.take(i), mention=("scene", "color1")).text for i in range(count)]
  return texts, factors
