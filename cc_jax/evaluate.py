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

import jax
import ml_collections
import numpy as np
from absl import flags
from etils import epath

from cc_jax import errors
from cc_jax.bases.base import Base, load_base
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.lab import judge as judging
from cc_jax.lab.scoring import contact_sheet, draw_trials, format_scores, score_images
from cc_jax.lab.trials import _SEED, Trials, base_prompts, make_trials
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.parallel.mesh import make_mesh
from cc_jax.sampling.images import grid
from cc_jax.sampling.pipeline import BASE, load
from cc_jax.sampling.prompts import encode_prompts
from cc_jax.sampling.sample import bundle
from cc_jax.sampling.sampler import ImageSampler
from data_pipeline.subjects3d import factors as world

GRID_SUBJECTS = 20


# ---- what the training calls


def draw_validation_grid(config: ml_collections.ConfigDict, base: Base, model: CustomContrast, file) -> None:
  """Writes a small grid of validation subjects while training goes on."""
  if not on_subjects3d(config):
    return
  trials = make_trials("validation", 10, **reference_display(config.data))
  sampler, batch = _drawer(config, base, model, 10)
  images = draw_trials(sampler, base.tokenizers, trials, config.sample, batch_size=batch,
                       s_words=config.encoder.s_words, scale=config.sample.scale, progress=False)
  _save(contact_sheet(trials, images, 10), file)


def score_test_subjects(config: ml_collections.ConfigDict, base: Base, model: CustomContrast,
           workdir) -> dict[str, dict[str, float]] | None:
  """Writes `grid.png` and `scores.json` of unseen subjects; prints the adapter's and base's scores.

  Subjects other than those of subjects3d have no known factors: then nothing is scored.
  """
  if not on_subjects3d(config):
    print(f"no scores: the judge knows subjects3d only, not {config.data.name}; draw with "
          f"python -m cc_jax.generate --checkpoint={workdir} --base={config.base}")
    return None
  c = config.sample
  trials = make_trials(c.split, c.subjects, **reference_display(config.data))
  sampler, batch = _drawer(config, base, model, c.subjects)
  return compare_with_base(sampler, base.tokenizers, trials, c, workdir, batch_size=batch, scale=c.scale,
                 s_words=config.encoder.s_words)


def compare_with_base(sampler: ImageSampler, tokenizers, trials: Trials, settings, workdir, *, scale: float,
            **rest) -> dict[str, dict[str, float]]:
  """Draws all trials with the adapter and with the base; scores, prints and writes both.

  Fidelity over control is a point of the trade-off figure. `rest`: batch_size and s_words of
  `draw_trials`.
  """
  judge, _ = judging.load_judge()  # before the drawing, which takes longer
  images = draw_trials(sampler, tokenizers, trials, settings, scale=scale, **rest)
  plain = draw_trials(sampler, tokenizers, trials, settings, scale=0.0, **rest)
  scores = {"adapter": score_images(images, trials, judge), "base": score_images(plain, trials, judge)}
  count = len(images)
  print(f"{count} unseen subjects, one reference each, 'a <class> <scene>':")
  for name, values in scores.items():
    print(f"  {name:8}{format_scores(values)}")
  folder = epath.Path(workdir)  # perhaps in a bucket
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "scores.json").write_text(json.dumps(dict(subjects=count, **scores), indent=2) + "\n")
  _save(contact_sheet(trials, images, min(GRID_SUBJECTS, count)), folder / "grid.png")
  print(f"{folder / 'grid.png'}: references above, new pictures with their prompts below")
  return scores


def reference_display(data: ml_collections.ConfigDict) -> dict:
  """How a training shows its references, as arguments of `show`; `Pipeline.shown` is its twin."""
  return dict(share=data.reference_share, size=data.image_size, place=data.reference_place)


def on_subjects3d(config: ml_collections.ConfigDict) -> bool:
  """Whether the config's data are the rendered world, whose factors are known."""
  return config.data.source == "render" or config.data.name.startswith("subjects3d")


def _drawer(config, base, model, count: int) -> tuple[ImageSampler, int]:
  mesh = make_mesh(config.mesh, config.train.batch_size)
  batch = min(-(-count // mesh.size), 12) * mesh.size
  return ImageSampler(model, NoiseSchedule.from_config(base.scheduler_config), mesh=mesh), batch


def _save(picture, file) -> None:
  file = epath.Path(file)
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open("wb") as out:
    picture.save(out, format="PNG")


def evaluate_base(base: Base, count: int, workdir, *, guidance: float, steps: int,
                  mesh: ml_collections.ConfigDict) -> dict[str, float]:
  """The base on `count` prompts of class, main colour and scene; writes its pictures."""
  devices = make_mesh(mesh, 48)
  sampler = ImageSampler(bundle(base), NoiseSchedule.from_config(base.scheduler_config), mesh=devices)
  texts, factors = base_prompts(count)
  images, _ = sampler(
    encode_prompts(base.tokenizers, texts), encode_prompts(base.tokenizers, [""]),
    noise=sampler.noise(range(_SEED, _SEED + count)), guidance=guidance, steps=steps,
    batch_size=48, progress=True)
  judge, _ = judging.load_judge()
  reading = judging.read(judge, images)
  scores = {name: float(np.mean(reading[name] == getattr(factors, name)))
            for name in ("class_id", "color1", "scene")}
  print(f"{base.name}, {count} prompts: {format_scores(scores)}")
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

  f = flags.FLAGS
  mesh = ml_collections.ConfigDict(dict(data=-1, cpu_devices=-1))
  set_cpu_devices(mesh, 48)
  if f.what == "base":
    base = load_base(f.base or BASE)
    evaluate_base(base, f.count or 200, f.workdir, guidance=f.guidance, steps=f.steps, mesh=mesh)
    return
  if f.split not in world.SPLITS:
    raise UserError(f"--split={f.split} is unknown; use one of {', '.join(world.SPLITS)}")
  pipe = load(f.checkpoint, f.base)
  if pipe.adapter is None:
    raise UserError("there is no adapter to score; give --checkpoint, or --what=base")
  trials = make_trials(f.split, f.count or 100, **pipe.shown)
  settings = ml_collections.ConfigDict(dict(
    guidance=f.guidance, image_guidance=f.image_guidance, steps=f.steps, sampler="default"))
  compare_with_base(pipe.sampler, pipe.base.tokenizers, trials, settings, f.workdir, scale=f.scale,
          batch_size=8 * len(jax.devices()), s_words=pipe.s_words)


if __name__ == "__main__":
  define_flags()
  errors.run(main)
