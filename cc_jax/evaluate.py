"""Scores an adapter, or the base alone, on subjects that training never saw.

  python -m cc_jax.evaluate                                    # the shipped adapter, 100 subjects
  python -m cc_jax.evaluate --checkpoint=runs/first --workdir=runs/first/eval
  python -m cc_jax.evaluate --what=base                        # the base, 200 prompts

The judge reads each drawn picture (`cc_jax.lab.judge`). Beside every score of the adapter
stands the base's: the same prompts and the same noise, without reference. Prompts name class and
scene, never colour or pattern.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import UInt8

from cc_jax import errors
from cc_jax.bases import base as hub
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.lab import judge as judging
from cc_jax.lab import leakage
from cc_jax.parallel import rules as sharding
from cc_jax.sampling.images import grid
from cc_jax.sampling.sampler import Drawer, bundle, encode_prompts
from data_pipeline.subjects3d import factors as world
from data_pipeline.subjects3d.bulk import render_many
from data_pipeline.subjects3d.captions import caption
from data_pipeline.triples import TripleConfig, show_reference

SCORES = ("scene", "class_id", "color1", "color2", "pattern")
GRID_SUBJECTS = 20
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
    references=show(rendered, share=share, size=size, place=place),
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


def show(rendered, *, share: float, size: int, place: str) -> UInt8[np.ndarray, "n s s 3"]:
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
  shown = show(rendered, share=share, size=size, place=place)
  asked = start._replace(scene=leakage.asked_scene(rng, start).astype(start.scene.dtype))
  return Interventions(
    references=dict(zip(views, shown.reshape(len(views), count, *shown.shape[1:]))),
    prompts=tuple(caption(rng, asked.take(i), mention=("scene",)).text for i in range(count)),
    nouns=tuple(world.CLASSES[c] for c in start.class_id),
    factors=start,
  )


def identity(reading: dict[str, np.ndarray], trials: Trials) -> np.ndarray:
  """Subject fidelity of each picture, [n]: the share of visible intrinsic factors that agree."""
  return judging.share(judging.agreement(reading, trials.factors, trials.seen))


def control(reading: dict[str, np.ndarray], trials: Trials) -> np.ndarray:
  """Text control of each picture, [n]: the share of what the prompt asks for that is there."""
  return judging.share(followed(reading, trials))


def followed(reading: dict[str, np.ndarray], trials: Trials) -> dict[str, np.ndarray]:
  """Per context factor, float [n]: 1 where it is as the prompt asks, NaN where it asks nothing."""
  asked = dict(scene=trials.scenes, style=trials.styles, hat=trials.hats)
  named = dict(scene=np.ones(len(trials.scenes), bool), style=trials.styles > 0,
               hat=(trials.hats > 0) & trials.seen["hat"])  # its colour does not show in a sketch
  return judging.agreement(reading, asked, named, judging.CONTEXT)


def score(images: UInt8[np.ndarray, "n h w 3"], trials: Trials, judge) -> dict[str, float]:
  """What the judge finds: shares of agreement, and correlations with the reference.

  fidelity, control: the means of `identity` and `control`; scene: with the prompt; class_id,
  color1, color2, pattern: with the reference, where visible; copied_size, copied_x, copied_y:
  correlation with the reference's (0 is what one wants, but for what the class alone implies:
  compare with the base's).
  """
  reading = judging.read(judge, images)
  scores = {"fidelity": float(np.nanmean(identity(reading, trials))),
            "control": float(np.nanmean(control(reading, trials))),
            "scene": float(np.mean(reading["scene"] == trials.scenes))}
  for name in SCORES[1:]:
    seen = trials.seen[name]
    scores[name] = float(np.mean((reading[name] == getattr(trials.factors, name))[seen]))
  for name in judging.CONTINUOUS:
    truth = getattr(trials.factors, name)
    scores[f"copied_{name}"] = float(np.corrcoef(reading[name], truth)[0, 1])
  return scores


def draw_trials(drawer: Drawer, tokenizers, trials: Trials | Interventions, settings, *,
                s_words: int, scale: float, batch_size: int, progress: bool = True,
                params=None) -> np.ndarray | dict[str, np.ndarray]:
  """One picture per trial, uint8 [n, h, w, 3]; `scale` 0 is the base, on the same noise.

  Of interventions, one for each of their references, under the same names, on the same noise.
  `params`: in place of the drawer's own.
  """
  if isinstance(trials, Interventions):
    names, count = list(trials.references), len(trials.references)
    trials = trials._replace(
      references=np.concatenate(list(trials.references.values())),
      prompts=trials.prompts * count, nouns=trials.nouns * count)
    seeds = list(range(_SEED, _SEED + len(trials.prompts) // count)) * count
  else:
    names, seeds = None, range(_SEED, _SEED + len(trials.prompts))
  subject = scale > 0 and drawer.is_subject_model
  prompts = encode_prompts(
    tokenizers, trials.prompts, trials.nouns if subject else None, s_words=s_words)
  apart = settings.image_guidance
  images, _ = drawer(
    prompts,
    encode_prompts(tokenizers, [""]),
    noise=drawer.noise(seeds),
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


def line(scores: dict[str, float]) -> str:
  """Scores on one line."""
  return "  ".join(f"{name.removesuffix('_id')} {value:+.2f}" if name.startswith("copied")
                   else f"{name.removesuffix('_id')} {100 * value:.0f} %"
                   for name, value in scores.items())


# ---- what the training calls


def draw(config: ml_collections.ConfigDict, base: hub.Base, model: CustomContrast, file) -> None:
  """Writes a small grid of validation subjects while training goes on."""
  if not on_subjects3d(config):
    return
  trials = make_trials("validation", 10, **shown(config.data))
  drawer, batch = _drawer(config, base, model, 10)
  images = draw_trials(drawer, base.tokenizers, trials, config.sample, batch_size=batch,
                       s_words=config.encoder.s_words, scale=config.sample.scale, progress=False)
  _save(contact_sheet(trials, images, 10), file)


def finish(config: ml_collections.ConfigDict, base: hub.Base, model: CustomContrast,
           workdir) -> dict[str, dict[str, float]] | None:
  """Writes `grid.png` and `scores.json` of unseen subjects; prints the adapter's and base's scores.

  Subjects other than those of subjects3d have no known factors: then nothing is scored.
  """
  if not on_subjects3d(config):
    print(f"no scores: the judge knows subjects3d only, not {config.data.name}; draw with "
          f"python -m cc_jax.generate --checkpoint={workdir} --base={config.base}")
    return None
  c = config.sample
  trials = make_trials(c.split, c.subjects, **shown(config.data))
  drawer, batch = _drawer(config, base, model, c.subjects)
  return compare(drawer, base.tokenizers, trials, c, workdir, batch_size=batch, scale=c.scale,
                 s_words=config.encoder.s_words)


def compare(drawer: Drawer, tokenizers, trials: Trials, settings, workdir, *, scale: float,
            **rest) -> dict[str, dict[str, float]]:
  """Draws all trials with the adapter and with the base; scores, prints and writes both.

  Fidelity over control is a point of the trade-off figure. `rest`: batch_size and s_words of
  `draw_trials`.
  """
  judge, _ = judging.load_judge()  # before the drawing, which takes longer
  images = draw_trials(drawer, tokenizers, trials, settings, scale=scale, **rest)
  plain = draw_trials(drawer, tokenizers, trials, settings, scale=0.0, **rest)
  scores = {"adapter": score(images, trials, judge), "base": score(plain, trials, judge)}
  count = len(images)
  print(f"{count} unseen subjects, one reference each, 'a <class> <scene>':")
  for name, values in scores.items():
    print(f"  {name:8}{line(values)}")
  folder = epath.Path(workdir)  # perhaps in a bucket
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "scores.json").write_text(json.dumps(dict(subjects=count, **scores), indent=2) + "\n")
  _save(contact_sheet(trials, images, min(GRID_SUBJECTS, count)), folder / "grid.png")
  print(f"{folder / 'grid.png'}: references above, new pictures with their prompts below")
  return scores


def shown(data: ml_collections.ConfigDict) -> dict:
  """How a training shows its references, as arguments of `show`; `Pipeline.shown` is its twin."""
  return dict(share=data.reference_share, size=data.image_size, place=data.reference_place)


def on_subjects3d(config: ml_collections.ConfigDict) -> bool:
  """Whether the config's data are the rendered world, whose factors are known."""
  return config.data.source == "render" or config.data.name.startswith("subjects3d")


def _drawer(config, base, model, count: int) -> tuple[Drawer, int]:
  mesh = sharding.make_mesh(config.mesh, config.train.batch_size)
  batch = min(-(-count // mesh.size), 12) * mesh.size
  return Drawer(model, NoiseSchedule.from_config(base.scheduler_config), mesh=mesh), batch


def _save(picture, file) -> None:
  file = epath.Path(file)
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open("wb") as out:
    picture.save(out, format="PNG")


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


def evaluate_base(base: hub.Base, count: int, workdir, *, guidance: float, steps: int,
                  mesh: ml_collections.ConfigDict) -> dict[str, float]:
  """The base on `count` prompts of class, main colour and scene; writes its pictures."""
  devices = sharding.make_mesh(mesh, 48)
  drawer = Drawer(bundle(base), NoiseSchedule.from_config(base.scheduler_config), mesh=devices)
  texts, factors = base_prompts(count)
  images, _ = drawer(
    encode_prompts(base.tokenizers, texts), encode_prompts(base.tokenizers, [""]),
    noise=drawer.noise(range(_SEED, _SEED + count)), guidance=guidance, steps=steps,
    batch_size=48, progress=True)
  judge, _ = judging.load_judge()
  reading = judging.read(judge, images)
  scores = {name: float(np.mean(reading[name] == getattr(factors, name)))
            for name in ("class_id", "color1", "scene")}
  print(f"{base.name}, {count} prompts: {line(scores)}")
  folder = Path(os.fspath(workdir))
  _save(grid(list(images[:60]), texts[:60], columns=10, scale=1.5), folder / "base.png")
  (folder / "base.json").write_text(json.dumps(dict(prompts=count, **scores), indent=2) + "\n")
  return scores


# ---- the command


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_enum("what", "adapter", ["adapter", "base"], "What is scored.")
  flags.DEFINE_string("checkpoint", None, "Adapter file or workdir; the shipped one by default.")
  flags.DEFINE_string("base", None, "Base folder; the adapter's, or the shipped one, by default.")
  flags.DEFINE_string("workdir", "runs/evaluate", "Where scores and pictures are written.")
  flags.DEFINE_string("split", "test", "train, validation or test.")
  flags.DEFINE_integer("count", 0, "Subjects (default 100) or prompts (default 200).")
  flags.DEFINE_integer("steps", 20, "Denoising steps.")
  flags.DEFINE_float("guidance", 5.0, "Classifier-free guidance.")
  flags.DEFINE_float("image_guidance", -1.0, "The image's own guidance; negative = one for both.")
  flags.DEFINE_float("scale", 1.0, "How much of the subject.")


def main(argv: Sequence[str]) -> None:
  """Command line entry."""
  del argv
  from cc_jax import generate

  f = flags.FLAGS
  mesh = ml_collections.ConfigDict(dict(data=-1, cpu_devices=-1))
  sharding.set_cpu_devices(mesh, 48)
  if f.what == "base":
    base = hub.load_base(f.base or generate.BASE)
    evaluate_base(base, f.count or 200, f.workdir, guidance=f.guidance, steps=f.steps, mesh=mesh)
    return
  if f.split not in world.SPLITS:
    raise UserError(f"--split={f.split} is unknown; use one of {', '.join(world.SPLITS)}")
  pipe = generate.load(f.checkpoint, f.base)
  if pipe.adapter is None:
    raise UserError("there is no adapter to score; give --checkpoint, or --what=base")
  trials = make_trials(f.split, f.count or 100, **pipe.shown)
  settings = ml_collections.ConfigDict(dict(
    guidance=f.guidance, image_guidance=f.image_guidance, steps=f.steps, sampler="default"))
  compare(pipe.drawer, pipe.base.tokenizers, trials, settings, f.workdir, scale=f.scale,
          batch_size=8 * len(jax.devices()), s_words=pipe.s_words)


if __name__ == "__main__":
  define_flags()
  errors.run(main)
