"""The paper's pictures, from a trained adapter: a map of S+, location maps, two subjects in one
picture, what lies between two subjects, a sheet of references and prompts; and what leaks.

    python -m cc_jax.lab --suite=pictures --checkpoint=runs/lab/method-0 \\
        --against=runs/lab/self_reconstruction-0 --figures=docs/lab

Each function takes a `generate.Pipeline` and returns a picture; notebooks call them too.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import ml_collections
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from cc_jax.errors import UserError
from cc_jax.lab.run_scores import embed, make_views
from cc_jax.lab.trials import Trials, make_interventions, make_trials
from cc_jax.metrics import features
from cc_jax.sampling.images import grid
from cc_jax.sampling.pipeline import Pipeline, load
from cc_jax.sampling.prompts import encode_with_negative
from data_pipeline.subjects3d import factors as world

MARKERS = "os^Dv*P<X>hp"  # one for each subject
SEED = 40_000  # of the noise
BATCH = 4  # pictures at once: one compiled program serves nearly all of them


def pictures(
  config: ml_collections.ConfigDict, checkpoint: str | os.PathLike,
  against: str | os.PathLike | None, folder: Path,
) -> None:
  """Writes every picture of `checkpoint` to `folder`.

  `against` stands beside it in the map of S+ and in the interventions.

  Raises:
    UserError: an adapter that does not exist or does not fit the base.
  """
  folder.mkdir(parents=True, exist_ok=True)
  pipe = load(checkpoint, config.run.base)
  pipes = {_name(checkpoint): pipe}
  if against is not None:
    pipes = {_name(against): load(against, config.run.base)} | pipes
  steps, score = config.run.sample.steps, config.score
  trials = trials_of(pipe, min(6, score.subjects), split=score.split)
  s_plus_map(pipes, subjects=min(8, score.probe_subjects), split=score.split,
             timestep=score.timestep).savefig(
    folder / "s_plus_map.png", dpi=110, bbox_inches="tight")
  drawn = {
    "interventions": interventions(
      pipes, min(2, score.interventions), split=score.split, steps=steps),
    "location_maps": location_maps(pipe, trials, steps=steps),
    "two_subjects": two_subjects(pipe, trials, steps=steps),
    "between_subjects": between_subjects(pipe, trials, steps=steps),
    "sheet": sheet(pipe, trials, steps=steps),
  }
  for name, picture in drawn.items():
    if picture is not None:
      picture.save(folder / f"{name}.png")
  print(f"{folder}: {', '.join(['s_plus_map', *drawn])} of {checkpoint}")


def s_plus_map(
  pipes: dict[str, Pipeline], *, layers: Sequence[int] | None = None, subjects: int = 8,
  views: int = 10, split: str = "validation", timestep: int = 500,
) -> Figure:
  """t-SNE of S+ at four layers, a row per adapter: one shape per subject, one colour per view.

  All subjects are shown in the same views: a cluster of one colour is a leaked view, a cluster of
  one shape a recognised subject. Layers are counted from 1; by default they are spread.
  """
  view = np.tile(np.arange(views), subjects)
  count = len(next(iter(pipes.values())).layer_paths)
  layers = layers or sorted({round(1 + share * (count - 1)) for share in (0, 1 / 3, 2 / 3, 1)})
  figure = Figure(figsize=(3.4 * len(layers), 3.5 * len(pipes)))
  grid_of_axes = figure.subplots(len(pipes), len(layers), squeeze=False)
  for row, (name, pipe) in zip(grid_of_axes, pipes.items()):
    references, factors = make_views(split, subjects, views, same=True, **pipe.shown)
    subject = np.unique(factors.subject_id, return_inverse=True)[1]
    pooled, _ = embed(model_of(pipe), references, timestep, batch=len(references))
    groups = [key for key in pooled if key.startswith("layer")]
    for axes, layer in zip(row, layers):
      group_of_layer = pipe.adapter.encoder.group_of_layer(len(pipe.layer_paths))
      group = groups[min(group_of_layer[layer - 1], len(groups) - 1)]
      points = features.tsne(pooled[group])
      for s in range(subjects):
        rows = subject == s
        axes.scatter(*points[rows].T, c=view[rows], cmap="hsv", vmin=0, vmax=views, s=28,
                     marker=MARKERS[s % len(MARKERS)], edgecolors="black", linewidths=0.3)
      recall = features.recall_at_1(pooled[group], subject)
      axes.set_title(f"{name}\nlayer {layer}, recall@1 {recall:.2f}", fontsize=9)
      axes.set(xticks=[], yticks=[])
  handles = [Line2D([], [], color="grey", marker=MARKERS[s % len(MARKERS)], ls="",
                    label=world.CLASSES[factors.class_id[subject == s][0]])
             for s in range(subjects)]
  figure.tight_layout()
  figure.legend(handles=handles, loc="upper center", ncols=min(8, len(handles)), fontsize=8,
                bbox_to_anchor=(0.5, 0), title="shape: subject, colour: view")
  return figure


def interventions(
  pipes: dict[str, Pipeline], count: int = 2, *, split: str = "validation", steps: int = 20
) -> Image.Image:
  """A reference with one irrelevant factor moved at a time, and below what each adapter draws.

  A row has one prompt and one noise: what changes in it has leaked (`cc_jax.lab.leakage`). The
  adapters' trainings must have shown references alike.
  """
  trials = make_interventions(split, count, **next(iter(pipes.values())).shown)
  names = list(trials.references)
  references = np.stack(list(trials.references.values()), axis=1)
  references = references.reshape(-1, *references.shape[2:])
  repeated = np.repeat(np.arange(count), len(names))
  prompts, nouns = ([texts[i] for i in repeated] for texts in (trials.prompts, trials.nouns))
  drawn = {name: draw(pipe, prompts, nouns, references, SEED + repeated, steps=steps)[0]
           for name, pipe in pipes.items()}
  cells, sides = [], []
  for i in range(count):
    row = slice(i * len(names), (i + 1) * len(names))
    cells += [*references[row], *(cell for images in drawn.values() for cell in images[row])]
    sides += [f"{trials.nouns[i]}: reference", *(f"{name}: {trials.prompts[i]}" for name in drawn)]
  heads = ["as it is", *(f"{name} moved" for name in names[1:])]
  return grid(cells, columns=len(names), column_headings=heads, row_headings=sides, scale=1.5)


def picture(
  pipe: Pipeline, trials: Trials, subject: int, prompt: str, *,
  scale: float = 1.0, seed: int = SEED, steps: int = 20,
) -> Image.Image:
  """A reference, what is drawn from it, and what the base draws from the same noise.

  '{}' in `prompt` stands for the class noun: 'a {} on the beach'.
  """
  noun = trials.nouns[subject]
  prompts, options = [prompt.format(noun)], dict(steps=steps, scale=scale)
  image, _ = draw(pipe, prompts, [noun], trials.references[subject][None], [seed], **options)
  plain, _ = draw(pipe, prompts, [noun], None, [seed], **options)
  return grid([trials.references[subject], image[0], plain[0]], scale=3,
              columns=3, column_headings=["reference", prompts[0], "the base alone"])


def location(
  pipe: Pipeline, trials: Trials, subject: int, *, layer: int = 1, step: int = 1,
  scale: float = 1.0, steps: int = 20,
) -> Image.Image:
  """A reference, the map m of one layer at one step (both counted from 1), and the picture.

  Raises:
    UserError: no such layer or step, or an adapter without maps.
  """
  if not pipe.adapter.injection.location:
    raise UserError("this adapter has no location maps (config.injection.location=False)")
  if not (1 <= layer <= len(pipe.layer_paths) and 1 <= step <= steps):
    raise UserError(f"layer {layer}, step {step}: there are {len(pipe.layer_paths)} and {steps}")
  images, maps = draw(pipe, [trials.prompts[subject]], [trials.nouns[subject]],
                      trials.references[subject][None], [SEED], steps=steps, maps=True,
                      scale=scale)
  heads = ["reference", f"map, layer {layer}, step {step}", trials.prompts[subject]]
  m = _grey(maps[layer - 1][step - 1, 0], images.shape[2])
  return grid([trials.references[subject], m, images[0]], columns=3, column_headings=heads, scale=3)


def location_maps(
  pipe: Pipeline, trials: Trials, *, count: int = 3, columns: int = 6, steps: int = 20,
  layer: int | None = None,
) -> Image.Image | None:
  """The map m of one layer over the denoising steps, the drawn picture at the end of each row.

  `layer` counts from 1; default is the one with the most pixels. None for an adapter without maps.
  """
  if not pipe.adapter.injection.location:
    return None
  count = min(count, len(trials.nouns))
  images, maps = draw(pipe, trials.prompts[:count], trials.nouns[:count], trials.references[:count],
                      range(SEED, SEED + count), steps=steps, maps=True)
  layer = layer or 1 + int(np.argmax([m.shape[2] for m in maps]))
  which = np.unique(np.linspace(0, steps - 1, columns).round().astype(int))
  cells = []
  for i in range(count):
    shades = [_grey(maps[layer - 1][k, i], images.shape[2]) for k in which]
    cells += [trials.references[i], *shades, images[i]]
  heads = ["reference", *(f"step {k + 1}" for k in which), "picture"]
  return grid(cells, columns=len(heads), column_headings=heads, scale=1.5,
              title=f"Location maps of layer {layer}: black = 0, white = 1")


def two_subjects(
  pipe: Pipeline, trials: Trials, *, count: int = 3, steps: int = 20
) -> Image.Image | None:
  """Two references and one picture with both, each S+ behind its own noun."""
  count = min(count, len(trials.nouns) // 2)
  if not count:
    return None
  first, second = slice(0, 2 * count, 2), slice(1, 2 * count, 2)
  nouns = list(zip(trials.nouns[first], trials.nouns[second]))
  prompts = [f"a {a} and a {b} on the beach" for a, b in nouns]
  images, _ = draw(pipe, prompts, nouns, trials.references[first], range(SEED, SEED + count),
                   steps=steps, extra_subjects=[trials.references[second, None]])
  cells, captions = [], []
  for i in range(count):
    cells += [trials.references[2 * i], trials.references[2 * i + 1], images[i]]
    captions += [*nouns[i], prompts[i]]
  return grid(cells, captions, columns=3, scale=2)


def between_subjects(
  pipe: Pipeline, trials: Trials, *, rows: int = 3, columns: int = 5, steps: int = 20
) -> Image.Image | None:
  """From one subject to another of another class, in equal steps of all outputs of the encoder.

  The prompt names the first subject; all pictures of a row start from the same noise.
  """
  rows = min(rows, len(trials.nouns) // 2)
  if not rows:
    return None
  weights = np.linspace(0, 1, columns).astype(np.float32)
  first = np.repeat(np.arange(rows) * 2, columns)
  images, _ = draw(pipe, [trials.prompts[i] for i in first], [trials.nouns[i] for i in first],
                   trials.references[first], SEED + first, steps=steps,
                   interpolate_to=(trials.references[first + 1][:, None], np.tile(weights, rows)))
  cells = []
  for i in range(rows):
    row = images[i * columns : (i + 1) * columns]
    cells += [trials.references[2 * i], *row, trials.references[2 * i + 1]]
  heads = ["from", *(f"{weight:.2f}" for weight in weights), "to"]
  return grid(cells, columns=columns + 2, column_headings=heads, scale=1.5)


def sheet(
  pipe: Pipeline, trials: Trials, *, subjects: int = 6,
  scenes: Sequence[str] = ("on the beach", "in the snow", "at night", "by a brick wall"),
  steps: int = 20,
) -> Image.Image:
  """References down the side, prompts along the top; the last column is the base's, without S+."""
  subjects = min(subjects, len(trials.nouns))
  which = np.repeat(np.arange(subjects), len(scenes))
  nouns = [trials.nouns[i] for i in which]
  prompts = [f"a {noun} {scene}" for noun, scene in zip(nouns, list(scenes) * subjects)]
  images, _ = draw(pipe, prompts, nouns, trials.references[which], SEED + which, steps=steps)
  first = slice(None, None, len(scenes))
  plain, _ = draw(pipe, prompts[first], nouns[first], None, (SEED + which)[first], steps=steps)
  cells = []
  for i in range(subjects):
    row = slice(i * len(scenes), (i + 1) * len(scenes))
    cells += [trials.references[i], *images[row], plain[i]]
  heads = ["reference", *scenes, f"base, {scenes[0]}"]
  return grid(cells, columns=len(heads), column_headings=heads, scale=1.5)


def draw(pipe: Pipeline, prompts: Sequence[str], nouns: Sequence, references, seeds, **options):
  """(pictures, location maps) of references [n, h, w, 3] that are shown as training showed them.

  A pipeline would cut out and re-centre them. `references` None draws with the base.
  """
  adapted = references is not None
  prompts, negative = encode_with_negative(
    pipe.base, list(prompts), list(nouns) if adapted else None,
    s_words=pipe.s_words if adapted else 0)
  return pipe.sampler(
    prompts, negative, batch_size=BATCH,
    noise=pipe.sampler.noise([int(seed) for seed in seeds]),
    references=references[:, None] if adapted else None, **options)


def model_of(pipe: Pipeline):
  """The CustomContrast model of a pipeline."""
  return pipe.sampler.merge(pipe.sampler.params)


def trials_of(pipe: Pipeline, count: int, *, split: str = "validation") -> Trials:
  """Unseen subjects, shown as the adapter's training showed its references."""
  return make_trials(split, count, **pipe.shown)


def _grey(m: np.ndarray, side: int) -> Image.Image:
  """A map of p places as a picture of `side` pixels."""
  rows = round(len(m) ** 0.5)
  shades = Image.fromarray((255 * np.clip(m.reshape(rows, rows), 0, 1)).astype(np.uint8))
  return shades.resize((side, side), Image.Resampling.NEAREST)


def _name(checkpoint: str | os.PathLike) -> str:
  path = Path(checkpoint)
  return (path if path.is_dir() else path.parent).name.replace("_", " ")
