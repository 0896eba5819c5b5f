"""The arithmetic of the laboratory: distances, probes, likeness, leakage, intervals."""

import numpy as np
import pytest
import scipy.stats

from cc_jax.lab import judge as judge_lib
from cc_jax.lab import leakage
from cc_jax.lab.trial_scores import subject_fidelity, text_control
from cc_jax.lab.trials import Trials, make_interventions
from cc_jax.metrics import features
from cc_jax.metrics.statistics import at_equal, hierarchical_bootstrap
from data_pipeline.subjects3d import factors as world


@pytest.fixture
def rng():
  return np.random.default_rng(0)


# ---- features


def test_distances_and_recall_by_hand():
  east, north, west = (1, 0), (0, 1), (-1, 0)
  x = np.array([east, (2, 0), north, west], float)  # lengths do not count
  subject = np.array([7, 7, 3, 3])
  found = features.distances(x, subject)
  assert found["within"] == pytest.approx((0 + 0 + 1 + 1) / 4)
  assert found["between"] == pytest.approx((1 + 2) / 2)
  assert found["ratio"] == pytest.approx(1 / 3)
  assert features.recall_at_1(x, subject) == 0.75  # north has two neighbours at the same distance
  # and takes the first of another subject


def test_spearman_equals_scipy(rng):
  a, b = rng.standard_normal(50).round(1), rng.standard_normal(50).round(1)  # with ties
  assert features.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0])
  assert features.spearman(a, np.ones(50)) == 0


def test_likeness_is_of_subjects_and_their_pairs(rng):
  means = rng.standard_normal((12, 6))
  x = np.repeat(means, 3, axis=0) + 1e-3 * rng.standard_normal((36, 6))
  subject = np.repeat(np.arange(12), 3)
  unit = means / np.linalg.norm(means, axis=1, keepdims=True)
  real = unit @ unit.T
  assert features.likeness(x, subject, real) > 0.99
  assert features.likeness(x, subject, -real) < -0.99


def test_ridge_predicts_what_is_linear_and_nothing_else(rng):
  x = rng.standard_normal((300, 10)) * np.logspace(-3, 3, 10)  # scales must not matter
  groups = np.repeat(np.arange(100), 3)
  fold = features.folds(groups)
  assert len(np.unique(fold)) == 5
  assert all(len(set(fold[groups == g])) == 1 for g in range(100))
  linear = x @ (rng.standard_normal(10) / np.logspace(-3, 3, 10))
  found = features.probes(
    x, {"side": (linear > 0).astype(int), "noise": rng.integers(0, 4, 300)},
    {"line": linear, "random": rng.standard_normal(300)}, fold)
  assert found["line"]["score"] > 0.99 and found["side"]["score"] > 0.9
  assert abs(found["side"]["chance"] - 0.5) < 0.1
  assert abs(found["random"]["score"]) < 0.1 and found["random"]["chance"] == 0
  assert abs(found["noise"]["score"] - found["noise"]["chance"]) < 0.12
  constant = np.concatenate([x, np.ones((300, 1))], axis=1)  # a feature that says nothing
  again = features.ridge_predictions(constant, linear[:, None], fold)
  np.testing.assert_allclose(again, features.ridge_predictions(x, linear[:, None], fold), atol=1e-6)


def test_probes_never_see_their_own_subject(rng):
  """Features that name the subject and nothing else predict nothing of a subject left out."""
  subject = np.repeat(np.arange(40), 5)
  x = rng.standard_normal((40, 200))[subject]
  colour = rng.integers(0, 4, 40)[subject]
  fair = features.probes(x, {"c": colour}, {}, features.folds(subject))["c"]["score"]
  unfair = features.probes(x, {"c": colour}, {}, np.arange(200) % 5)["c"]["score"]
  assert unfair > 0.95 and fair < 0.5


def test_what_cannot_be_told_is_not_overfitted(rng):
  """More features than pictures, and a number that all views of a subject share."""
  subject = np.repeat(np.arange(40), 5)
  x = rng.standard_normal((40, 300))[subject] + 0.3 * rng.standard_normal((200, 300))
  place = rng.random(200)
  x[:, :3] += 3 * place[:, None]
  sizes = {str(n): rng.random(40)[subject] for n in range(20)}
  found = features.probes(x, {}, {**sizes, "place": place}, features.folds(subject))
  assert abs(np.mean([found[name]["score"] for name in sizes])) < 0.16
  assert found["place"]["score"] > 0.35
  with pytest.raises(ValueError, match="2 folds; one is predicted"):
    features.ridge_predictions(x, place[:, None], subject % 2)


def test_tsne_keeps_neighbours_together(rng):
  centres = 4 * np.eye(5, 20)
  x = np.repeat(centres, 12, axis=0) + 0.3 * rng.standard_normal((60, 20))
  label = np.repeat(np.arange(5), 12)
  y = features.tsne(x, perplexity=8, steps=250)
  apart = np.linalg.norm(y[:, None] - y[None], axis=-1) + 1e9 * np.eye(60)
  assert np.mean(label[apart.argmin(1)] == label) > 0.98
  within = np.mean([apart[i, j] for i in range(60) for j in range(60)
                    if i != j and label[i] == label[j]])
  assert within < 0.3 * np.mean(apart[label[:, None] != label[None]])
  p = features._affinities(np.square(np.linalg.norm(x[:, None] - x[None], axis=-1)), 8)
  entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), 1)
  np.testing.assert_allclose(np.exp(entropy), 8, rtol=1e-3)


# ---- intervals


def test_bootstrap_covers_and_counts_seeds(rng):
  covered = 0
  for trial in range(60):
    effect = 0.1 + 0.05 * rng.standard_normal((6, 1))  # a spread between seeds
    values = effect + 0.3 * rng.standard_normal((6, 40))
    interval = hierarchical_bootstrap(values, draws=300, seed=trial)
    assert interval.low <= interval.mean <= interval.high
    covered += interval.low <= 0.1 <= interval.high
  assert covered >= 50
  same = np.repeat([[0.0], [1.0]], 50, axis=1)  # subjects agree, seeds do not
  found = hierarchical_bootstrap(same)
  assert found.low == 0 and found.high == 1 and not found.excludes_zero
  # Every seed finds the same of each subject: three seeds tell no more than one.
  subjects = rng.standard_normal(40)
  once, thrice = (hierarchical_bootstrap(np.tile(subjects, (n, 1))) for n in (1, 3))
  width = 2 * 1.96 * subjects.std() / 40**0.5
  assert once.high - once.low == pytest.approx(width, rel=0.1)
  assert thrice.high - thrice.low == pytest.approx(width, rel=0.1)
  hidden = np.where(np.arange(50) < 25, np.nan, 1.0)[None]
  assert hierarchical_bootstrap(hidden).mean == 1


def test_at_equal_identity():
  identity, value = [0.2, 0.4, 0.6], [0.1, 0.3, 0.9]
  assert at_equal(identity, value, 0.5) == pytest.approx(0.6)
  assert at_equal(identity, value, 0.1) == 0.1
  assert np.isnan(at_equal(identity, value, 0.7))


# ---- likeness of subjects


def test_real_similarity_counts_each_factor():
  table = world.subjects("train")
  one = table.take(np.zeros(2, int))
  same = world.real_similarity(one)
  np.testing.assert_allclose(same, 1)
  pattern = 1 if one.pattern[0] != 1 else 2

  def changed(**fields):
    return world.real_similarity(one._replace(
      **{name: np.array([getattr(one, name)[0], value]) for name, value in fields.items()}))[0, 1]

  assert changed(class_id=(one.class_id[0] + 1) % 10) == pytest.approx(5 / 6)
  red, orange, blue = (world.COLORS.index(name) for name in ("red", "orange", "blue"))
  one = one._replace(color1=np.array([red, red]))
  assert 5 / 6 < changed(color1=blue) < changed(color1=orange) < 1
  one = one._replace(pattern=np.array([pattern, pattern]))
  assert changed(pattern=0) == pytest.approx(4 / 6)  # plain: neither pattern nor its colour agree
  wide = one.wide[0]
  assert changed(wide=-1 if wide > 0 else 1) == pytest.approx(1 - (1 + abs(wide)) / 6 / 6)


def test_shares_leave_out_what_cannot_be_seen():
  reading = dict(class_id=np.array([1, 2]), color1=np.array([3, 3]))
  truth = dict(class_id=np.array([1, 1]), color1=np.array([3, 4]))
  seen = dict(class_id=np.ones(2, bool), color1=np.array([True, False]))
  agreed = judge_lib.agreement(reading, truth, seen, ("class_id", "color1"))
  np.testing.assert_array_equal(judge_lib.share(agreed), [1, 0])
  assert np.isnan(agreed["color1"][1])
  assert np.isnan(judge_lib.share({"a": np.array([np.nan])}))[0]


# ---- leakage


def start(count=6):
  return leakage.start(np.random.default_rng(1), world.subjects("test").take(np.arange(count)))


def test_moves_change_one_factor_alone():
  before = start()
  for name in leakage.MOVES:
    after = leakage.moved(before, name)
    changed = {key for key in world.Factors._fields
               if not np.array_equal(getattr(before, key), getattr(after, key))}
    assert changed == (set(leakage.MOVES[name]) or {"scene"})
  asked = leakage.asked_scene(np.random.default_rng(0), before)
  assert not np.any(asked == before.scene)
  assert not np.any(asked == leakage.moved(before, "scene").scene)


@pytest.mark.parametrize("copied", (0.0, 0.4, 1.0))
def test_leakage_is_the_share_that_is_copied(copied, monkeypatch):
  """A judge that reads pictures in which the reference's move is made by a share."""
  before = start()
  readings = {}
  for name in ("start", *leakage.MOVES):
    after = before if name == "start" else leakage.moved(before, name)
    reading = {key: np.asarray(getattr(before, key), float) + copied * (
      np.asarray(getattr(after, key), float) - np.asarray(getattr(before, key), float))
      for key in ("size", "x", "y", "azimuth")}
    reading["azimuth"] += 2 * np.pi  # an angle is an angle
    reading["size"] += 0.3  # what class implies moves with nothing
    scenes = np.full(6, 99)
    few = slice(0, round(6 * copied))
    scenes[few] = after.scene[few]
    readings[name] = reading | dict(scene=scenes)
  pictures = {name: np.full((6, 1, 1, 3), number, np.uint8)
              for number, name in enumerate(readings)}

  def read(_, images):
    rows = [list(readings.values())[n] for n in images[::6, 0, 0, 0]]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}

  monkeypatch.setattr(judge_lib, "read", read)
  monkeypatch.setattr(leakage, "light_side",
                      lambda images, reading: np.full(6, images[0, 0, 0, 0] / 4 * copied
                                                      if "light_azimuth" not in reading
                                                      else images[0, 0, 0, 0] / 4))
  found = leakage.measure(None, pictures, pictures, before)
  for name in ("size", "place", "azimuth", "light"):
    known = found[name][~np.isnan(found[name])]
    np.testing.assert_allclose(known, copied, atol=1e-6, err_msg=name)
  assert found["scene"].mean() == pytest.approx(round(6 * copied) / 6)
  front = [world.CLASSES[c] in world.CLASSES_WITH_FRONT for c in before.class_id]
  assert np.array_equal(~np.isnan(found["azimuth"]), front)


def test_light_is_seen_from_its_side():
  ramp = np.linspace(0, 255, 64).astype(np.uint8)
  right = np.broadcast_to(ramp[None, :, None], (64, 64, 3))
  reading = dict(x=np.zeros(2), y=np.zeros(2), size=np.ones(2))
  found = leakage.light_side(np.stack([right, right[:, ::-1]]), reading)
  assert found[0] > 0.1 and found[0] == pytest.approx(-found[1], abs=1e-6)
  away = dict(x=np.array([0.3, 0.3]), y=np.zeros(2), size=np.full(2, 0.5))
  flat = right.copy()
  flat[:, 40:] = 255  # the disc lies where nothing changes
  assert leakage.light_side(np.stack([flat] * 2), away)[0] == pytest.approx(0, abs=0.02)


def test_identity_and_control_of_trials(monkeypatch):
  f = start(2)
  seen = judge_lib.visible(f._replace(style=np.array([0, 2])), np.full((2, 4), 0.1))
  trials = Trials(
    references=None, prompts=(), nouns=(), scenes=np.array([4, 5]), styles=np.array([0, 2]),
    hats=np.array([3, 0]), factors=f, visible=seen)
  reading = {name: getattr(f, name).copy() for name in judge_lib.INTRINSIC}
  reading["class_id"][0] += 1
  reading |= dict(scene=np.array([4, 5]), style=np.array([1, 1]), hat=np.array([3, 7]))
  counted = 4 + int(f.pattern[0] != 0)  # a plain subject has no pattern colour
  np.testing.assert_allclose(subject_fidelity(reading, trials), [1 - 1 / counted, 1])
  np.testing.assert_allclose(text_control(reading, trials), [1, 0.5])  # no style was asked
  reading["hat"] = np.array([2, 7])  # of another colour; the second picture was asked for none
  np.testing.assert_allclose(text_control(reading, trials), [0.5, 0.5])


@pytest.mark.slow
def test_leakage_of_the_references_themselves_is_one():
  """The measure, judge and all: pictures that are the moved references, and ones that never move.

  The judge is not perfect, nor is a disc the subject: what a copy reaches is the measure's scale.
  """
  what = make_interventions("test", 40, layout="frame")
  judge, _ = judge_lib.load_judge()
  copied = leakage.measure(judge, what.references, what.references, what.factors)
  still = {name: what.references["start"] for name in what.references}
  kept = leakage.measure(judge, still, what.references, what.factors)
  for name in leakage.MOVES:
    assert np.nanmean(kept[name]) == pytest.approx(0, abs=1e-6), name
    assert 0.7 < np.nanmean(copied[name]) < 1.3, (name, np.nanmean(copied[name]))
