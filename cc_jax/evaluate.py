"""Scores an adapter, or the base alone, on subjects that training never saw.

  python -m cc_jax.evaluate                                    # the shipped adapter, 100 subjects
  python -m cc_jax.evaluate --checkpoint=runs/first --workdir=runs/first/eval
  python -m cc_jax.evaluate --what=base                        # the base, 200 prompts
  python -m cc_jax.evaluate --benchmark=dreambench --data=FOLDER --scorers=clip:FOLDER,dino:FOLDER

The judge, a network, reads each drawn picture (`cc_jax.lab.judge`). The base is scored beside the
adapter: on the same prompts and noise, without reference. Prompts name class and scene, never
colour or pattern.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from etils import epath

import data_pipeline
from cc_jax import cli
from cc_jax.bases.base import Base, load_base
from cc_jax.benchmark import run as benchmark
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.lab.trial_scores import compare_with_base, contact_sheet, draw_trials, evaluate_base
from cc_jax.lab.trials import check_split, make_trials
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.parallel.mesh import make_mesh
from cc_jax.sampling.images import make_folder, reference_display, save
from cc_jax.sampling.pipeline import BASE, Pipeline, load
from cc_jax.sampling.prompt_grid import PromptGrid, ShownSubject, draw_sheet, make_prompt_grid
from cc_jax.sampling.prompts import encode_prompts
from cc_jax.sampling.sampler import ImageSampler
from data_pipeline.triples import segment_reference

BASE_BATCH = 48  # of --what=base
LOOK_SUBJECTS, GRID_SUBJECTS = 4, 20  # at most, in pictures of other data on the way, at the end

# ---- callbacks of training: cc_jax.training.loop.Callbacks


def check_drawing(config: ml_collections.ConfigDict, base: Base) -> str:
  """Before the first step: what the drawing of other data than subjects3d would stumble over later.

  Returns what is to be said: whom the pictures will show, and which key has no effect on such data.
  Raises UserError or DataError: a prompt without noun or too long, no subject that can be drawn.
  """
  if data_pipeline.is_subjects3d(config.data) and not config.sample.prompts:
    return ""
  cells = _prompts_to_draw(config, LOOK_SUBJECTS)
  encode_prompts(base.tokenizers, cells.prompts, cells.nouns, s_words=config.encoder.s_words)
  if data_pipeline.is_subjects3d(config.data):
    return ""
  return (f"pictures of {config.data.name} will show {', '.join(cells.rows)}; "
          f"config.sample.split={config.sample.split} has no effect on these data")


def draw_validation_grid(
  config: ml_collections.ConfigDict, base: Base, model: CustomContrast, file
) -> None:
  """Writes a small grid of unseen subjects to `file` while training goes on.

  Of config.sample.prompts; without any, validation subjects of subjects3d in other scenes, and
  subjects of other data by their captions.
  """
  if config.sample.prompts or not data_pipeline.is_subjects3d(config.data):
    _draw_prompts(config, base, model, file, LOOK_SUBJECTS)
    return
  trials = make_trials("validation", 10, **reference_display(config.data))
  images = draw_trials(trials=trials, progress=False, **_draw_options(config, base, model, 10))
  save(contact_sheet(trials, images, 10), file)


def score_test_subjects(
  config: ml_collections.ConfigDict, base: Base, model: CustomContrast, workdir
) -> dict[str, dict[str, float]] | None:
  """Writes `grid.png` and `scores.json` of unseen subjects; prints the adapter's and base's scores.

  Data other than subjects3d have no known factors: nothing is scored then, and the grid is that of
  config.sample.prompts.
  """
  if not data_pipeline.is_subjects3d(config.data):
    _draw_prompts(config, base, model, epath.Path(workdir) / "grid.png", GRID_SUBJECTS)
    print(f"{workdir}/grid.png: references on the left. No scores: the judge knows subjects3d "
          f"only, not {config.data.name}; draw more with python -m cc_jax.generate "
          f"--checkpoint={workdir} --base={config.base}")
    return None
  count = config.sample.subjects
  trials = make_trials(config.sample.split, count, **reference_display(config.data))
  return compare_with_base(trials, workdir, **_draw_options(config, base, model, count))


def _draw_prompts(config, base, model, file, most: int) -> None:
  """Draws config.sample.prompts of at most `most` subjects, few pictures at a time."""
  cells = _prompts_to_draw(config, most)
  options = _draw_options(config, base, model, LOOK_SUBJECTS)
  save(draw_sheet(cells, draw_trials(trials=cells, progress=False, **options)), file)


def _prompts_to_draw(config, most: int) -> PromptGrid:
  """Always the same subjects, so that the pictures of two steps can be compared."""
  count, display = min(config.sample.subjects, most), reference_display(config.data)
  if data_pipeline.is_subjects3d(config.data):  # rendered, since source 'render' has them nowhere
    trials = make_trials("validation", count, **display)
    columns = trials.nouns, trials.references, trials.nouns, trials.prompts
    subjects = list(itertools.starmap(ShownSubject, zip(*columns)))
  else:
    subjects = [
      ShownSubject(
        subject.name if subject.held_out else f"{subject.name} (in training)",
        segment_reference(subject.image, subject.mask, **display), subject.class_noun,
        subject.caption)
      for subject in data_pipeline.heldout_subjects(config.data, count)]
  return make_prompt_grid(subjects, config.sample.prompts)


def _draw_options(config, base, model, count: int) -> dict[str, Any]:
  """Arguments of `draw_trials`; batches of at most 12 images per device, on training's mesh."""
  mesh = make_mesh(config.mesh, config.train.batch_size)
  schedule = NoiseSchedule.from_config(base.scheduler_config)
  return dict(
    sampler=ImageSampler(model, schedule, mesh=mesh, attention=config.train.attention), base=base,
    settings=config.sample, s_words=config.encoder.s_words, scale=config.sample.scale,
    batch_size=min(-(-count // mesh.size), 12) * mesh.size)


# ---- the command


def define_flags() -> None:
  """The command's flags."""
  benchmark.define_flags()
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
  """The command."""
  del argv
  f = flags.FLAGS
  if f.count < 0:
    raise UserError(f"--count={f.count}: draw at least one, or leave it out")
  make_folder(f.workdir)  # before the drawing, which takes long
  mesh = ml_collections.ConfigDict(dict(data=-1, cpu_devices=-1))
  set_cpu_devices(mesh, BASE_BATCH)
  if f.benchmark:
    benchmark.run_flags(f)
    return
  if f.what == "base":
    evaluate_base(load_base(f.base or BASE), f.count or 200, f.workdir, guidance=f.guidance,
                  steps=f.steps, mesh=make_mesh(mesh, BASE_BATCH), batch_size=BASE_BATCH)
    return
  check_split(f.split)
  pipe = load(f.checkpoint, f.base)
  if pipe.adapter is None:
    raise UserError("there is no adapter to score; give --checkpoint, or --what=base")
  _say_what_is_scored(pipe)
  settings = ml_collections.ConfigDict(dict(
    guidance=f.guidance, image_guidance=f.image_guidance, steps=f.steps, sampler="default"))
  compare_with_base(
    make_trials(f.split, f.count or 100, **pipe.shown), f.workdir, scale=f.scale,
    sampler=pipe.sampler, base=pipe.base, settings=settings,
    s_words=pipe.s_words, batch_size=8 * len(jax.devices()))


def _say_what_is_scored(pipe: Pipeline) -> None:
  """What the scores of an adapter mean that was trained on other data than the judge knows."""
  source, _, name = pipe.adapter.notes.get("data", "").partition(" ")
  data = ml_collections.ConfigDict(dict(source=source, name=name))
  if name and not data_pipeline.is_subjects3d(data):
    print(f"{pipe.source} was trained on {source} {name}, which the judge does not know. Scored "
          f"are rendered subjects of subjects3d, drawn with {pipe.base.name}: whether your own "
          "come out is for you to see, with python -m cc_jax.generate")


if __name__ == "__main__":
  cli.run(main, define_flags)
