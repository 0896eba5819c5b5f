"""A benchmark from a folder to its result: everything is checked before anything is drawn."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from PIL import Image

from cc_jax.benchmark import drawing, report
from cc_jax.benchmark.copying import copying
from cc_jax.benchmark.drawing import Drawer, Task, make_tasks
from cc_jax.benchmark.scoring import IMAGE, TEXT, ceiling, score_tasks, summary
from cc_jax.benchmark.subjects import LAYOUTS, Benchmark, read_benchmark
from cc_jax.errors import UserError
from cc_jax.metrics.scorer import Scorer
from cc_jax.metrics.scorers import KINDS, load_scorer
from cc_jax.parallel.mesh import make_mesh
from cc_jax.sampling.pipeline import load

PER_DEVICE = 8  # pictures that a device draws, or scores, at once


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides how a benchmark's pictures are drawn; every picture carries it."""

  checkpoint: str  # sha256, 16 hex digits; '' = the base alone
  base: str
  steps: int
  guidance: float
  image_guidance: float | None
  scale: float


def define_flags() -> None:
  """The flags of the benchmarks, beside those of `evaluate`."""
  flags.DEFINE_enum("benchmark", None, list(LAYOUTS), "A published protocol (docs/benchmark.md).")
  flags.DEFINE_string("data", None, "The benchmark's folder, as its authors publish it.")
  flags.DEFINE_list("scorers", [], f"KIND:FOLDER,...; kinds: {', '.join(KINDS)}.")
  flags.DEFINE_integer("images", 4, "Pictures for each prompt of a benchmark.")
  flags.DEFINE_list("subjects", [], "Only these subjects; they come out as in the whole.")
  flags.DEFINE_boolean("copying", False, "Also how much of the reference picture is copied; draws "
                       "the plain prompt from a second reference.")


def run_flags(values: flags.FlagValues) -> None:
  """`python -m cc_jax.evaluate --benchmark=...`."""
  if not values.data:
    raise UserError(f"--benchmark={values.benchmark} needs --data, the folder with its pictures")
  if values.images < 1 or values.count:
    raise UserError("a benchmark draws --images=4 (at least 1) for each prompt, and takes no "
                    "--count; choose subjects by --subjects=NAME,NAME")
  if values.steps < 1:
    raise UserError(f"--steps={values.steps}: a sampler takes at least 1 step, usually 20")
  named = _scorer_folders(values.scorers)
  benchmark = read_benchmark(values.benchmark, values.data, values.subjects)
  for note in benchmark.notes:
    print(f"note: {note}")
  batch_size = PER_DEVICE * len(jax.devices())
  mesh = make_mesh(ml_collections.ConfigDict(dict(data=-1)), batch_size)
  scorers = {kind: load_scorer(kind, folder, batch_size=batch_size, mesh=mesh)
             for kind, folder in named.items()}
  alone = values.what == "base"
  pipe = load(None if alone else values.checkpoint, values.base, mesh=mesh)
  if alone:
    pipe.adapter, pipe.s_words = None, 0
  tasks = make_tasks(benchmark.subjects, count=values.images, references=1 + values.copying)
  drawing.check_prompts(tasks, pipe.base.tokenizers, pipe.s_words)
  image_guidance = values.image_guidance if values.image_guidance >= 0 else None
  file = Path(pipe.source) if pipe.adapter else None
  settings = Settings(drawing.file_hash(file), pipe.base.hash, values.steps, values.guidance,
                      image_guidance, values.scale if pipe.adapter else 0.0)
  draw = drawing.pipeline_drawer(
    pipe, batch_size=batch_size, guidance=settings.guidance, steps=settings.steps,
    image_guidance=image_guidance if pipe.adapter else None, scale=settings.scale)
  model = f"{file.name} on {pipe.base.name}" if file else f"{pipe.base.name} alone"
  result = run(benchmark, tasks, draw, scorers, settings, Path(values.workdir), model=model,
               batch_size=batch_size, with_copying=values.copying)
  print(report.to_markdown(result))
  print(f"{values.workdir}/scores.json, table.md, sheet.png")


def run(
  benchmark: Benchmark, tasks: Sequence[Task], draw: Drawer, scorers: Mapping[str, Scorer],
  settings: Settings, workdir: Path, *, model: str, batch_size: int, with_copying: bool = False,
  progress: bool = True,
) -> dict[str, Any]:
  """Draws what is missing in `workdir`/pictures, scores all, writes and returns the result."""
  for scorer in scorers.values():
    scorer.check_prompts(list(dict.fromkeys(task.prompt for task in tasks)))
  folder = workdir / "pictures"
  drawing.draw_missing(tasks, folder, draw, dataclasses.asdict(settings), batch_size=batch_size,
                       progress=progress)

  def read(task: Task) -> np.ndarray:
    with Image.open(folder / task.file) as image:
      return np.array(image.convert("RGB"))

  rows = score_tasks(tasks, read, scorers, progress=progress)
  result = dict(
    benchmark=benchmark.name, model=model, summary=summary(tasks, rows),
    ceiling=ceiling(benchmark.subjects, scorers),
    copying=copying(tasks, read, scorers) if with_copying else {},
    scorers=_names(scorers), choices=_choices(benchmark, tasks, settings),
    notes=list(benchmark.notes),
    pictures=[dict(file=task.file, subject=task.subject.name, kind=task.kind, prompt=task.prompt,
                   seed=task.seed, scores=row) for task, row in zip(tasks, rows, strict=True)])
  workdir.mkdir(parents=True, exist_ok=True)
  report.write(result, report.contact_sheet(tasks, rows, read), workdir)
  return result


def _scorer_folders(given: Sequence[str]) -> dict[str, str]:
  named = {}
  for text in given:
    kind, colon, folder = text.partition(":")
    if kind not in KINDS or not colon or not folder:
      raise UserError(f"--scorers={text!r} is no KIND:FOLDER; kinds are {', '.join(KINDS)}")
    if kind in named:
      raise UserError(f"--scorers names {kind} twice; give one folder of each kind")
    named[kind] = folder
  if not named.keys() & (IMAGE.keys() | TEXT.keys()):
    raise UserError("a benchmark needs --scorers=KIND:FOLDER,..., such as "
                    "clip:openai/clip-vit-base-patch32,dino:facebook/dino-vits16")
  return named


def _names(scorers: Mapping[str, Scorer]) -> dict[str, str]:
  """Each score in full: backbone, prefix, factor, background, over what, checkpoint."""
  names = {}
  for kind, scorer in scorers.items():
    text = scorer.describe()
    if kind in IMAGE:
      names[IMAGE[kind]] = f"mean over all real pictures of the subject (min: the smallest); {text}"
    if kind in TEXT:
      names[TEXT[kind]] = f"picture and its prompt, without the unique token; {text}"
    if kind == "lpips":
      names["LPIPS"] = text
  return names


def _choices(benchmark: Benchmark, tasks: Sequence[Task], settings: Settings) -> dict[str, Any]:
  subjects = benchmark.subjects
  per_prompt = 1 + max(task.index for task in tasks)
  return dict(
    subjects=len(subjects), real_pictures=sum(len(s.pictures) for s in subjects),
    pictures_per_prompt=per_prompt, pictures=sum(task.reference == 0 for task in tasks),
    R="the plain prompt 'a photo of a NOUN', ours",
    E="every prompt of the benchmark's list, background and property changes alike",
    reference="the subject's first picture by name",
    real="all pictures of the subject, the reference among them, whole, background included",
    means="over a subject's pictures, then over subjects",
    seed="sha256 of (subject, prompt, index)", sampler="the base's own",
    **{f"drawn with {key}": value for key, value in dataclasses.asdict(settings).items()})
