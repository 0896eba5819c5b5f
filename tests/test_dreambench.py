"""Benchmarks: folders as published, pictures drawn once, scores against numpy, the command."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from cc_jax.benchmark import drawing, run
from cc_jax.benchmark.drawing import Task, make_tasks
from cc_jax.benchmark.scoring import summary
from cc_jax.benchmark.subjects import EDITING, PLAIN, read_benchmark
from cc_jax.errors import UserError
from cc_jax.lab import copying_check
from cc_jax.metrics import copying
from data_pipeline.errors import DataError
from data_pipeline.subjects3d import factors as world
from data_pipeline.subjects3d.renderer import render

ROOT = Path(__file__).parent.parent
NAMES = {"red_cup": "cup", "cat2": "cat", "old_car": "car", "sofa": "sofa"}
SCENES = ("on the beach", "in the snow", "in a forest", "at night")
SETTINGS = run.Settings("0123", "4567", 2, 5.0, None, 1.0)


def list_text(names, scenes=SCENES):
  """prompts_and_classes.txt in the published form."""
  template = "'a {{0}} {{1}} {}'.format(unique_token, class_token),\n"
  lists = ["".join(template.format(words) for words in part)
           for part in (scenes, [*scenes[:-1], "wearing a hat"])]
  classes = "".join(f"{name},{noun}\n" for name, noun in names.items())
  return (f"Classes\n\nsubject_name,class\n{classes}\nPrompts\n\nObject Prompts\n\n"
          f"prompt_list = [\n{lists[0]}]\n\nLive Subject Prompts\n\nprompt_list = [\n{lists[1]}]\n")


def picture(seed, size=(24, 20)):
  """Blocks of random colours: whatever looks at it has something to see."""
  small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
  return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


def dreambench(folder, names=NAMES, pictures=2):
  for number, name in enumerate(names):
    (folder / "dataset" / name).mkdir(parents=True)
    for index in range(pictures):
      file = folder / "dataset" / name / f"{index:02}.jpg"
      picture(10 * number + index, (80, 64)).save(file)
      mask = np.zeros((64, 80), np.uint8)
      mask[16:48, 20:60] = 255
      Image.fromarray(mask).save(file.with_name(f"{index:02}_mask.png"))
  (folder / "dataset" / "prompts_and_classes.txt").write_text(list_text(names))
  return folder


class MeanColor:
  """A scorer of numpy: an image is its mean colour, a text the lengths of its words."""

  def image_features(self, pictures, *, masks=None, background="white"):
    return np.array([np.asarray(p, np.float64).mean((0, 1)) for p in pictures])

  def text_features(self, prompts):
    return np.array([[len(p), p.count("a"), p.count(" ")] for p in prompts], np.float64)

  def pair_scores(self, a, b):
    return np.array([np.abs(np.int32(x) - np.int32(y)).mean() for x, y in zip(a, b)])

  def check_prompts(self, prompts):
    pass

  def describe(self):
    return "mean colour; sha256 00"


def draw_noise(tasks):
  return [np.random.default_rng([task.seed, task.reference]).integers(0, 256, (8, 8, 3), np.uint8)
          for task in tasks]


def run_fake(folder, workdir, *, subjects=(), draw=draw_noise, settings=SETTINGS):
  benchmark = read_benchmark("dreambench", folder, subjects)
  tasks = make_tasks(benchmark.subjects, count=2, references=2)
  scorers = {"clip": MeanColor(), "lpips": MeanColor()}
  run.run(benchmark, tasks, draw, scorers, settings, workdir, model="noise", batch_size=3,
          with_copying=True, progress=False)
  return (workdir / "scores.json").read_text()


# ---- folders


def test_dreambench_as_it_is_published(tmp_path):
  """Classes, and the list that belongs to each; the unique token is out of every prompt."""
  read = read_benchmark("dreambench", dreambench(tmp_path))
  assert {subject.name: subject.noun for subject in read.subjects} == NAMES
  prompts = {subject.name: subject.prompts for subject in read.subjects}
  assert prompts["sofa"] == (
    (PLAIN, "a photo of a sofa"), *((EDITING, f"a sofa {scene}") for scene in SCENES))
  assert prompts["cat2"][-1] == (EDITING, "a cat wearing a hat")
  cup = read.subjects[-2]
  assert [file.name for file in cup.pictures] == ["00.jpg", "01.jpg"]
  assert [file.name for file in cup.masks] == ["00_mask.png", "01_mask.png"]
  assert read.notes == ()


def test_dreambench_plus_and_a_folder_of_ones_own(tmp_path):
  plus, own = tmp_path / "plus", tmp_path / "own"
  for part in ("images", "captions"):
    (plus / part / "live_subject" / "animal").mkdir(parents=True)
  picture(0).save(plus / "images/live_subject/animal/00.jpg")
  captions = plus / "captions/live_subject/animal/00.txt"
  captions.write_text("Grey kitten\na grey kitten on a sofa\nan empty sofa\n")
  read = read_benchmark("dreambench_plus", plus)
  assert [s.name for s in read.subjects] == ["live_subject_animal_00_grey_kitten"]
  assert read.subjects[0].prompts[1:] == ((EDITING, "a grey kitten on a sofa"),)
  assert "1 prompts do not name their subject" in read.notes[0]
  (own / "mug").mkdir(parents=True)
  picture(1).convert("L").save(own / "mug" / "a.png")
  (own / "mug" / "class.txt").write_text("mug\n")
  (own / "prompts.txt").write_text("a {} on a desk\n\n")
  read = read_benchmark("folder", own)
  assert read.subjects[0].prompts[1:] == ((EDITING, "a mug on a desk"),)
  assert "grey pictures are taken as RGB" in read.notes[0] and "mug/a.png" in read.notes[0]


def _no_pictures(folder):
  for file in (folder / "dataset/sofa").iterdir():
    file.unlink()


MISTAKES = {
  "the subject sofa has no pictures": _no_pictures,
  "prompts_and_classes.txt is missing": lambda f: (
    f / "dataset/prompts_and_classes.txt").rename(f / "list"),
  "has no object prompts and no live subject prompts": lambda f: (
    f / "dataset/prompts_and_classes.txt").write_text("subject_name,class\nsofa,sofa\n"),
  "00.jpg is no picture": lambda f: (f / "dataset/sofa/00.jpg").write_text("x"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named_before_anything_is_drawn(message, tmp_path):
  MISTAKES[message](dreambench(tmp_path))
  with pytest.raises(UserError, match=message):
    read_benchmark("dreambench", tmp_path)


def test_a_prompt_over_the_limit_is_named(tiny_folder, tmp_path):
  from cc_jax.bases.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(tiny_folder / "tokenizer")
  subject = read_benchmark("dreambench", dreambench(tmp_path)).subjects[0]
  fits = Task(subject, PLAIN, "a cat", 0)
  drawing.check_prompts([fits], [tokenizer], 1)
  too_long = dataclasses.replace(fits, prompt="a cat" + " on the beach" * 20)
  with pytest.raises(DataError, match="has .* tokens; the limit is 15"):
    drawing.check_prompts([fits, too_long], [tokenizer], 1)


@pytest.mark.parametrize(("given", "message"), [
  ([], "needs --scorers"), (["clip"], "no KIND:FOLDER"), (["clip:a", "clip:b"], "twice"),
  (["lpips:a"], "needs --scorers")])  # fmt: skip
def test_scorers_that_cannot_be(given, message):
  with pytest.raises(UserError, match=message):
    run._scorer_folders(given)


# ---- pictures and scores


def test_scores_are_the_formulas(tmp_path):
  """Against numpy in float64, with the pictures read by PIL."""
  result = json.loads(run_fake(dreambench(tmp_path / "data"), tmp_path / "out"))

  def colour(file):
    with Image.open(file) as image:
      return unit(np.asarray(image.convert("RGB"), np.float64).mean((0, 1)))

  def unit(x):
    return x / np.linalg.norm(x)

  means = {}
  for row in result["pictures"]:
    drawn = colour(tmp_path / "out/pictures" / row["file"])
    real = [colour(tmp_path / "data/dataset" / row["subject"] / f"0{k}.jpg") for k in range(2)]
    cosines = [drawn @ r for r in real]
    scores, shown = row["scores"], int(row["file"][-5])
    assert scores["CLIP-I"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert scores["CLIP-I min"] == pytest.approx(min(cosines), abs=1e-6)
    assert scores["CLIP-I reference"] == pytest.approx(cosines[shown], abs=1e-6)
    text = row["prompt"]
    text = unit(np.array([len(text), text.count("a"), text.count(" ")], float))
    assert scores["CLIP-T"] == pytest.approx(drawn @ text, abs=1e-6)
    if row["kind"] == "E":
      means.setdefault(row["subject"], []).append(np.mean(cosines))
  found = result["summary"]["E CLIP-I"]
  assert found["mean"] == pytest.approx(np.mean([np.mean(v) for v in means.values()]), abs=1e-6)
  assert found["low"] < found["mean"] < found["high"] and found["subjects"] == 4
  pairs = [colour(tmp_path / f"data/dataset/{n}/00.jpg") @
           colour(tmp_path / f"data/dataset/{n}/01.jpg") for n in NAMES]
  assert result["ceiling"]["CLIP-I"]["mean"] == pytest.approx(np.mean(pairs), abs=1e-6)
  assert {"copy score (CLIP-I)", "pose (CLIP-I)", "background (CLIP-I)", "LPIPS between references",
          "LPIPS between seeds"} == result["copying"].keys()
  table = (tmp_path / "out/table.md").read_text()
  ours = f"| **noise** | {result['summary']['E CLIP-T']['mean']:.3f} ["
  assert ours in table and "| CustomContrast (Stable Diffusion 1.5, published) | 0.325 |" in table
  assert "mean colour; sha256 00" in table
  assert Image.open(tmp_path / "out/sheet.png").width > 800


def test_killed_twice_and_half_of_it(tmp_path):
  """The same JSON; each picture is drawn once; the scores of half are those of the whole."""
  folder, drawn = dreambench(tmp_path / "data"), []

  def fails_after(calls):
    def draw(tasks):
      if len(drawn) >= calls:
        raise KeyboardInterrupt
      drawn.append([(task.file) for task in tasks])
      return draw_noise(tasks)

    return draw

  for calls in (3, 7):
    with pytest.raises(KeyboardInterrupt):
      run_fake(folder, tmp_path / "killed", draw=fails_after(calls))
  killed = run_fake(folder, tmp_path / "killed", draw=fails_after(1000))
  assert killed == run_fake(folder, tmp_path / "once")
  files = [file for batch in drawn for file in batch]
  assert len(files) == len(set(files)) == 4 * (5 * 2 + 2)
  half = json.loads(run_fake(folder, tmp_path / "half", subjects=("cat2", "sofa")))["pictures"]
  whole = {row["file"]: row for row in json.loads(killed)["pictures"]}
  assert len(half) == 24 and all(row == whole[row["file"]] for row in half)


def test_pictures_drawn_otherwise_are_refused(tmp_path):
  folder = dreambench(tmp_path / "data")
  before = run_fake(folder, tmp_path / "out")
  with pytest.raises(UserError, match="was drawn with another steps"):
    run_fake(folder, tmp_path / "out", settings=dataclasses.replace(SETTINGS, steps=9))
  picture(99).save(folder / "dataset/cat2/00.jpg")
  with pytest.raises(UserError, match="was drawn with another reference"):
    run_fake(folder, tmp_path / "out")
  assert (tmp_path / "out/scores.json").read_text() == before


def test_seeds_are_of_the_picture_alone():
  """sha256 of the JSON of subject, prompt and index, by hand; the reference does not count."""
  import hashlib

  subject = drawing.Subject("cat2", "cat", (), (), ())
  task = Task(subject, PLAIN, "a cat", 3)
  digest = hashlib.sha256(b'["cat2", "a cat", 3]').hexdigest()
  assert task.seed == int(digest[:8], 16) // 2 == dataclasses.replace(task, reference=1).seed
  tasks = [task, dataclasses.replace(task, reference=1)]
  found = summary(tasks, [{"x": 1.0}, {"x": 5.0}])  # further references do not count
  assert found["R x"]["mean"] == 1.0


# ---- copying


def test_copying_by_hand():
  east, north, west = (2.0, 0), (0, 1), (-1, 0)
  views, drawn = np.array([east, north, west]), np.array([east, north, (1, 1)], float)
  # Drawn is the reference: (90 - 0) / 90 and (180 - 0) / 180.
  np.testing.assert_allclose(copying.copy_score(drawn, views, 0), [
    1, ((0 - 90) / 90 + (90 - 90) / 180) / 2, ((45 - 45) / 90 + (135 - 45) / 180) / 2], atol=1e-9)
  root = np.sqrt(0.5)
  np.testing.assert_allclose(copying.pose_copy(drawn, views, 0), [1, -1, 0], atol=1e-9)
  found = copying.background_copy(drawn, np.array(east), np.array([north, west], float))
  np.testing.assert_allclose(found, [1 + 0.5, -0.5, root - 0], atol=1e-9)
  assert np.isnan(copying.copy_score(drawn, views[:1], 0)).all()
  assert np.isnan(copying.pose_copy(drawn, views[:1], 0)).all()
  assert list(copying.pairs_within("abab")) == [(0, 2), (1, 3)]


def test_leakage_is_exact_and_its_correlation_is_scipys():
  subjects = world.subjects("test").take(np.arange(5))
  own, reference = (world.sample_factors(np.random.default_rng(k), subjects) for k in range(2))
  luck = np.array([0.0, 0.2, 0.3, 0.6, 0.9])
  found = copying_check.leaking(own, reference, 0.3, luck)
  np.testing.assert_allclose(found.size, 0.7 * own.size + 0.3 * reference.size, rtol=1e-6)
  np.testing.assert_array_equal(found.scene[:2], reference.scene[:2])
  np.testing.assert_array_equal(found.scene[2:], own.scene[2:])
  np.testing.assert_array_equal(found.azimuth, copying_check.leaking(found, own, 0, luck).azimuth)
  behind = own._replace(azimuth=np.full(5, -3.0)), own._replace(azimuth=np.full(5, 3.0))
  halfway = copying_check.leaking(*behind, 0.5, luck).azimuth  # by the back, which is near
  np.testing.assert_allclose(np.cos(halfway), -1, atol=1e-6)
  values = np.random.default_rng(0).normal(size=(7, 30)) + np.arange(7)[:, None] / 3
  value, low, high = copying_check.correlation(values, draws=50)
  assert value == pytest.approx(
    scipy.stats.spearmanr(values.ravel(), np.repeat(np.arange(7), 30))[0], abs=1e-9)
  assert low < value < high


# ---- the whole command, with the mini base and its adapter


COMMAND = """
import sys
import jax
from cc_jax import cli, evaluate

jax.config.update("jax_num_cpu_devices", int(sys.argv.pop(1)))
jax.config.update("jax_compilation_cache_dir", sys.argv.pop(1))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
evaluate.set_cpu_devices = lambda *_: None
cli.run(evaluate.main, evaluate.define_flags)
"""


def real_folder(folder):
  """Two rendered views of each subject, with masks, in DreamBench's form."""
  subjects = world.subjects("test")
  chosen = subjects.take(np.arange(4) * 97)
  names = {f"{world.CLASSES[c]}_{k}": world.CLASSES[c] for k, c in enumerate(chosen.class_id)}
  for index in range(2):
    rendered = render(world.sample_factors(np.random.default_rng(index), chosen, style=0, hat=0))
    for name, image, mask in zip(names, rendered.image, rendered.mask, strict=True):
      file = folder / "dataset" / name / f"{index:02}.png"
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(file)
      Image.fromarray(mask).save(file.with_name(f"{index:02}_mask.png"))
  (folder / "dataset" / "prompts_and_classes.txt").write_text(list_text(names))
  return list(names)


def make_clip(folder):
  """A small random CLIP whose tokenizer reads the prompts in a few tokens."""
  import transformers

  from cc_jax.bases.tokenizer import train_tokenizer

  texts = [f"a photo of a {noun} {scene}" for noun in world.CLASSES for scene in SCENES]
  tokenizer = train_tokenizer(texts, folder, 700, max_length=24)
  small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
  text = dict(**small, vocab_size=len(tokenizer), bos_token_id=len(tokenizer) - 2,
              eos_token_id=len(tokenizer) - 1, max_position_embeddings=24)  # fmt: skip
  vision = dict(**small, image_size=32, patch_size=16)
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
  return transformers.CLIPModel(config)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """(folder of the benchmark, names, a function that starts the command)."""
  import test_scorers
  from torch_parity import randomise

  root = tmp_path_factory.mktemp("benchmark")
  names = real_folder(root)
  makers = {"clip": make_clip, "dino": test_scorers.make_dino}
  for kind, make in makers.items():
    (root / kind).mkdir()
    randomise(make(root / kind)).save_pretrained(root / kind)
  (root / "lpips").mkdir()
  test_scorers.save_lpips(root / "lpips", "alex")
  scorers = [f"{kind}:{root / kind}" for kind in (*makers, "lpips")]

  def start(workdir, *flags, devices=2):
    arguments = [sys.executable, "-c", COMMAND, devices, root / "cache", "--benchmark=dreambench",
                 f"--data={root}", f"--scorers={','.join(scorers)}", "--images=2", "--steps=4",
                 "--copying", f"--workdir={workdir}", *flags]
    return subprocess.Popen([str(part) for part in arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  return root, names, start


def finished(process):
  out, errors = process.communicate(timeout=900)
  assert process.returncode == 0, errors[-3000:]
  return out


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
  """The workdir of a run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp("whole")
  finished(command[2](workdir))
  return workdir


@pytest.mark.slow
def test_the_command_killed_twice_gives_the_same_json(command, whole, tmp_path):
  for least in (1, 17):
    process = command[2](tmp_path)
    while process.poll() is None and len(list(tmp_path.rglob("*.png"))) < least:
      time.sleep(0.05)
    assert process.poll() is None  # it was still at work
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "scores.json").exists()
  finished(command[2](tmp_path))
  assert (tmp_path / "scores.json").read_text() == (whole / "scores.json").read_text()
  result = json.loads((whole / "scores.json").read_text())
  assert len(result["pictures"]) == 4 * (5 + 1) * 2
  assert (whole / "sheet.png").is_file() and "sha256" in (whole / "table.md").read_text()


def scores_of(workdir):
  return {row["file"]: row["scores"] for row in
          json.loads((workdir / "scores.json").read_text())["pictures"]}


def assert_scores_agree(workdir, whole, count):
  found, expected = scores_of(workdir), scores_of(whole)
  assert len(found) == count
  for file, scores in found.items():
    for name, value in scores.items():
      assert value == pytest.approx(expected[file][name], abs=1e-5), (file, name)


@pytest.mark.slow
def test_half_of_it_has_the_same_scores(command, whole, tmp_path):
  _, names, start = command
  finished(start(tmp_path, f"--subjects={','.join(names[:2])}"))
  assert_scores_agree(tmp_path, whole, 24)


@pytest.mark.slow
def test_eight_devices_score_the_same(command, whole, tmp_path):
  """Of the same pictures; they are taken as drawn, so no rounding to 8 bits is between."""
  shutil.copytree(whole / "pictures", tmp_path / "pictures")
  finished(command[2](tmp_path, devices=8))
  assert_scores_agree(tmp_path, whole, 48)


@pytest.mark.slow
def test_eight_devices_draw_the_same(command, whole, tmp_path):
  """One value in 10,000 may be rounded to the next of 256, which small random networks amplify."""
  finished(command[2](tmp_path, devices=8))
  differences = []
  for file in scores_of(whole):
    ours, theirs = (Image.open(folder / "pictures" / file) for folder in (tmp_path, whole))
    differences.append(np.abs(np.int32(ours) - np.int32(theirs)))
  assert np.max(differences) <= 1 and np.mean(differences) < 1e-4
  summaries = [json.loads((folder / "scores.json").read_text())["summary"]
               for folder in (tmp_path, whole)]
  for name, value in summaries[0].items():
    assert value["mean"] == pytest.approx(summaries[1][name]["mean"], abs=1e-5), name


@pytest.mark.slow
def test_a_scorers_folder_of_another_model_is_named(command, tmp_path):
  root, _, start = command
  process = start(tmp_path, f"--scorers=dino:{root / 'clip'}")
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 1 and "error: " in errors and "Traceback" not in errors
  assert not list(tmp_path.rglob("*.png"))
