"""Trials and scores of the evaluation."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from cc_jax import evaluate
from cc_jax.bases.files import ASSETS
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.errors import UserError
from cc_jax.evaluate import check_drawing, draw_validation_grid, score_test_subjects
from cc_jax.lab import judge as judging
from cc_jax.lab.trial_scores import score_images
from cc_jax.lab.trials import base_prompts, make_trials
from configs import subjects3d
from data_pipeline.subjects3d import factors as world


@pytest.fixture(scope="module")
def trials():
  return make_trials("test", 2)


def test_trials_are_unseen_subjects_in_another_scene(trials):
  train = world.subjects("train")
  seen = set(zip(train.class_id, train.color1, train.color2))
  for i in range(2):
    f = trials.factors.take(i)
    assert (f.class_id, f.color1, f.color2) not in seen
    assert trials.nouns[i] == world.CLASSES[f.class_id] and trials.nouns[i] in trials.prompts[i]
    assert trials.scenes[i] != f.scene
    assert not set(world.COLORS) & set(trials.prompts[i].split())
  assert trials.factors.class_id[0] != trials.factors.class_id[1]
  assert (trials.factors.hat == 0).all() and (trials.factors.style == 0).all()
  border = np.concatenate([trials.references[:, 0], trials.references[:, -1]])
  assert (border == 255).all()  # cut out, on white
  again = make_trials("test", 2)
  np.testing.assert_array_equal(again.references, trials.references)
  assert again.prompts == trials.prompts


def test_some_prompts_ask_for_more_than_a_scene():
  trials = make_trials("test", 8, styled=4, hatted=2)
  assert (trials.styles > 0).tolist() == [True, False, False, False] * 2
  assert (trials.hats > 0).tolist() == [False, True] * 4
  for i, prompt in enumerate(trials.prompts):
    assert ("hat" in prompt) == (trials.hats[i] > 0)
    if trials.hats[i]:
      color = world.COLORS[trials.hats[i] - 1]
      assert color in prompt.split() and trials.hats[i] - 1 != trials.factors.color1[i]
  assert (trials.factors.hat == 0).all()  # no reference wears one


def test_every_round_shows_the_same_subjects_otherwise():
  how = dict(styled=4, hatted=2)
  once, twice = (make_trials("test", 4, rounds=rounds, **how) for rounds in (1, 2))
  first = twice.first(4)
  np.testing.assert_array_equal(first.references, once.references)
  assert first.prompts == once.prompts and first.visible.keys() == once.visible.keys()
  for name, column in once.visible.items():
    np.testing.assert_array_equal(first.visible[name], column)
  assert len(twice.references) == len(twice.prompts) == len(twice.factors.size) == 8
  np.testing.assert_array_equal(twice.factors.subject_id, np.tile(once.factors.subject_id, 2))
  assert (twice.factors.size[4:] != once.factors.size).all()
  assert not (twice.references[4:] == once.references).all((1, 2, 3)).any()
  assert twice.nouns[4:] == once.nouns and set(twice.prompts[4:]).isdisjoint(once.prompts)
  assert (twice.hats > 0).tolist() == [False, True, False, True, True, False, True, False]
  assert (twice.styles > 0).tolist() == [True, *[False] * 6, True]


def test_scores_count_agreement_where_the_reference_shows_it(trials, monkeypatch):
  f = trials.factors
  reading = {name: getattr(f, name).copy() for name in judging.CATEGORIES}
  reading["scene"] = trials.scenes.copy()
  reading["scene"][0] = f.scene[0]  # the reference's scene, copied
  reading["color1"] = (f.color1 + np.array([0, 1])) % 11
  reading |= {name: -getattr(f, name) for name in judging.CONTINUOUS}
  monkeypatch.setattr(judging, "read", lambda judge, images: reading)
  hidden = {**trials.visible, "color1": np.array([True, False])}
  scores = score_images(trials.references, trials._replace(visible=hidden), None)
  assert scores["scene"] == 0.5 and scores["class_id"] == 1 and scores["color1"] == 1
  assert score_images(trials.references, trials, None)["color1"] == 0.5
  assert scores["copied_size"] == pytest.approx(-1)


@pytest.mark.filterwarnings("error")
def test_scores_that_few_pictures_do_not_define_are_absent(monkeypatch):
  """One picture has no correlation, and no second colour where none shows; NaN is no JSON."""
  trials = make_trials("test", 1)
  reading = {name: np.asarray(getattr(trials.factors, name)) for name in (
    *judging.INTRINSIC, *judging.CONTEXT, *judging.CONTINUOUS)}
  monkeypatch.setattr(judging, "read", lambda *_: reading | {"scene": trials.scenes})
  visible = trials.visible | {"color2": np.zeros(1, bool)}
  scores = score_images(trials.references, trials._replace(visible=visible), None)
  assert {"copied_size", "copied_x", "copied_y", "color2"}.isdisjoint(scores)
  assert scores["scene"] == scores["class_id"] == 1
  json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("what", ["adapter", "base"])
@pytest.mark.parametrize("workdir, count, said", [
  ("file", 0, "cannot write to the folder"), ("file/below", 0, "cannot write to the folder"),
  ("new", -3, "--count=-3")])
def test_what_the_command_cannot_do_is_found_before_it_loads(
    tmp_path, monkeypatch, what, workdir, count, said):
  (tmp_path / "file").write_text("mine")
  values = SimpleNamespace(what=what, workdir=str(tmp_path / workdir), count=count)
  monkeypatch.setattr(evaluate, "flags", SimpleNamespace(FLAGS=values))
  monkeypatch.setattr(evaluate, "set_cpu_devices", lambda *_: pytest.fail("it goes on"))
  with pytest.raises(UserError, match=said):
    evaluate.main([])


def test_errors():
  with pytest.raises(UserError, match="test has 1 to"):
    make_trials("test", 10**6)


def test_base_prompts_spread_over_all_values():
  texts, factors = base_prompts(110)
  assert (np.bincount(factors.class_id) == 11).all() and (np.bincount(factors.color1) == 10).all()
  for i, text in enumerate(texts):
    assert world.COLORS[factors.color1[i]] in text.split()
    assert world.CLASSES[factors.class_id[i]] in text


# Pictures of other data.

COLOURS = {"a_duck": (200, 30, 40), "b_car": (30, 40, 200), "c_bear": (20, 160, 60)}
NOUNS = {"a_duck": "duck", "b_car": "car", "c_bear": "teddy bear"}


@pytest.fixture
def own_data(tmp_path, monkeypatch):
  """(config of three subjects in a folder, a base that is only a tokenizer, what was drawn).

  The sampler's place is taken by one that draws (10 n, 250, 0) for the picture n of a call.
  """
  folder = tmp_path / "subjects3d_mine"  # the name says nothing of what the data are (P11)
  for name, colour in COLOURS.items():
    (folder / name).mkdir(parents=True)
    for file in ("1.png", "2.png"):
      pixels = np.zeros((20, 30, 4), np.uint8)
      pixels[4:14, 6:16] = (*colour, 255)
      Image.fromarray(pixels).save(folder / name / file)
    captions = {file: f"a {NOUNS[name]} in the snow" for file in ("1.png", "2.png")}
    listing = {"class_noun": NOUNS[name], "captions": captions}
    (folder / name / "captions.json").write_text(json.dumps(listing))
  config = subjects3d.get_config()
  config.data.update(source="folder", name=str(folder), image_size=32)
  base = SimpleNamespace(
    tokenizers=[load_tokenizer(ASSETS / "subjects3d-base" / "tokenizer")],
    scheduler_config=tiny.SCHEDULER, force_zeros_for_empty_prompt=False)
  drawn = []

  class Sampler:
    is_subject_model = True

    def __init__(self, *_, **__):
      pass

    def noise(self, seeds):
      return np.asarray(seeds)

    def __call__(self, prompts, *_, **options):
      drawn.append(dict(ids=prompts.ids[0], **options))
      colours = [(10 * n, 250, 0) for n in range(len(options["noise"]))]
      return np.asarray(colours, np.uint8)[:, None, None] * np.ones((1, 32, 32, 1), np.uint8), None

  monkeypatch.setattr(evaluate, "ImageSampler", Sampler)
  return config, base, drawn


def place(picture, colour):
  """(x, y) of the middle of what has this colour."""
  ys, xs = np.nonzero((np.asarray(picture) == colour).all(-1))
  assert len(xs) > 100, colour
  return xs.mean(), ys.mean()


def test_prompts_are_drawn_of_subjects_that_training_leaves_out(own_data, tmp_path, capsys):
  """C6: of any data there is something to look at, on the way and at the end."""
  config, base, drawn = own_data
  config.data.holdout_subjects = 2
  config.sample.update(prompts=("a photo of a {noun}", "the {noun} at night"), guidance=3.0)
  said = check_drawing(config, base)
  names = [name for name in COLOURS if name in said]
  assert len(names) == 2 and said.count("config.sample.split=test has no effect") == 1
  assert "in training" not in said
  names.sort(key=said.index)
  file = tmp_path / "samples" / "0000002.png"
  draw_validation_grid(config, base, None, file)
  texts = [text.format(NOUNS[name])
           for name in names for text in ("a photo of a {}", "the {} at night")]
  assert [base.tokenizers[0].decode(ids, skip_special_tokens=True).strip()
          for ids in drawn[0]["ids"]] == texts
  assert drawn[0]["guidance"] == 3.0 and drawn[0]["sampler"] == "dpmsolver++"
  assert drawn[0]["references"].shape == (4, 1, 32, 32, 3)
  for n, reference in enumerate(drawn[0]["references"][:, 0]):
    assert tuple(reference[16, 16]) == COLOURS[names[n // 2]]  # cut out, in the middle, on white
    assert (reference[[0, -1]] == 255).all() and (reference[:, [0, -1]] == 255).all()
  # A row for each subject: the reference, then what was drawn, a column for each prompt.
  sheet = Image.open(file)
  for row, name in enumerate(names):
    places = [place(sheet, COLOURS[name]), place(sheet, (20 * row, 250, 0)),
              place(sheet, (20 * row + 10, 250, 0))]
    xs, ys = zip(*places)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=1) and xs[1] - xs[0] > 48
    assert np.ptp(ys) < 2
  assert place(sheet, (0, 250, 0))[1] < place(sheet, (20, 250, 0))[1]
  # At the end as well, and without prompts by their captions; two starts show the same.
  config.sample.prompts = ()
  assert score_test_subjects(config, base, None, tmp_path) is None
  assert "the judge knows subjects3d only" in capsys.readouterr().out
  ids = base.tokenizers[0].batch_decode(drawn[1]["ids"], skip_special_tokens=True)
  assert [text.strip() for text in ids] == [f"a {NOUNS[name]} in the snow" for name in names]
  place(Image.open(tmp_path / "grid.png"), COLOURS[names[1]])
  # Only as many as one has time to look at while training goes on, and it is said who they are.
  config.data.holdout_subjects = 0
  config.sample.subjects = 1
  assert "(in training)" in check_drawing(config, base)
  draw_validation_grid(config, base, None, file)
  assert len(drawn[2]["references"]) == 1


def test_prompts_of_subjects3d(own_data, trials, tmp_path, monkeypatch):
  """Where none are given, its grid stays what it was."""
  config, base, drawn = own_data
  asked = []

  def make(split, count, **display):
    asked.append((split, count, display))
    return trials.first(count)

  monkeypatch.setattr(evaluate, "make_trials", make)
  monkeypatch.setattr(evaluate, "contact_sheet", lambda *_: Image.new("RGB", (2, 2)))
  config.data.update(source="render", image_size=64)
  assert check_drawing(config, base) == ""
  draw_validation_grid(config, base, None, tmp_path / "a.png")
  assert asked == [("validation", 10, dict(ratio=0.8, size=64, layout="centred"))]
  assert len(drawn[0]["noise"]) == 2
  config.sample.prompts = ("a {noun} in the snow",)
  config.sample.subjects = 1
  assert check_drawing(config, base) == ""
  draw_validation_grid(config, base, None, tmp_path / "b.png")
  np.testing.assert_array_equal(drawn[1]["references"][:, 0], trials.references[:1])
  text = base.tokenizers[0].decode(drawn[1]["ids"][0], skip_special_tokens=True)
  assert text.strip() == f"a {trials.nouns[0]} in the snow"


@pytest.mark.parametrize("prompt", ["a dog on the beach", "a {class} in the snow"])
def test_a_prompt_without_noun_is_found_before_the_first_step(own_data, prompt):
  """P12"""
  config, base, _ = own_data
  config.sample.prompts = ("a {noun} at night", prompt)
  with pytest.raises(UserError, match="config.sample.prompts has .*write {noun} where the subject"):
    check_drawing(config, base)
