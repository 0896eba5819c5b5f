"""Trials and scores of the evaluation."""

import ml_collections
import numpy as np
import pytest

from cc_jax.errors import UserError
from cc_jax.evaluate import score_test_subjects
from cc_jax.lab import judge as judging
from cc_jax.lab.trial_scores import score_images
from cc_jax.lab.trials import base_prompts, make_trials
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


def test_errors():
  with pytest.raises(UserError, match="test has 1 to"):
    make_trials("test", 10**6)


def test_base_prompts_spread_over_all_values():
  texts, factors = base_prompts(110)
  assert (np.bincount(factors.class_id) == 11).all() and (np.bincount(factors.color1) == 10).all()
  for i, text in enumerate(texts):
    assert world.COLORS[factors.color1[i]] in text.split()
    assert world.CLASSES[factors.class_id[i]] in text


def test_other_data_are_not_scored(tmp_path, capsys):
  config = ml_collections.ConfigDict(dict(data=dict(source="folder", name="mine"), base="b"))
  assert score_test_subjects(config, None, None, tmp_path) is None
  assert "the judge knows subjects3d only" in capsys.readouterr().out
