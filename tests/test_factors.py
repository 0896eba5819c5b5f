"""The judge's arithmetic; and the shipped judge on fresh renders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cc_jax.errors import UserError
from cc_jax.lab import judge as judge_lib
from data_pipeline.subjects3d import factors as world


def rows(count=6, **fields):
  rng = np.random.default_rng(0)
  table = world.subjects("train")
  return world.sample_factors(rng, table.take(np.arange(count)), **fields)


def test_factors_that_cannot_be_seen_are_masked():
  f = rows(6, style=np.array([0, 1, 0, 0, 0, 0]), hat=0)
  f = f._replace(
    class_id=np.array([world.CLASSES.index(c) for c in
                       ("teapot", "teapot", "mushroom", "tree", "car", "car")]),
    pattern=np.array([1, 1, 0, 1, 1, 0]))
  coverage = np.full((6, 4), 0.1)
  coverage[3, 2] = 0.001  # hardly any second colour
  coverage[4, 3] = 0.0  # the pattern does not show
  seen = judge_lib.visible(f, coverage)
  sketch = 1
  assert not seen["color1"][sketch] and not seen["pattern"][sketch] and seen["class_id"][sketch]
  assert seen["color2"].tolist() == [True, False, True, False, True, True]
  assert seen["pattern"].tolist() == [True, False, True, True, False, True]  # plain is visible
  assert seen["pattern_color"].tolist() == [True, False, False, True, False, False]
  assert seen["azimuth"].tolist() == [True, True, False, False, True, True]


def test_accuracy_counts_visible_rows_and_neighbouring_bins():
  f = rows(4, style=np.array([0, 0, 0, 1]), hat=0,
           azimuth=np.array([0.0, 3.1, 1.0, 0.0], np.float32))
  f = f._replace(class_id=np.zeros(4, np.int32))
  reading = {name: getattr(f, name).copy() for name in judge_lib.CATEGORIES}
  reading["color1"] = (f.color1 + np.array([0, 0, 1, 1])) % 11  # one wrong, one wrong but unseen
  reading["azimuth"] = np.array([0.0, -3.1, -1.0, 0.9])  # right, right across +-pi, wrong, near
  reading |= {name: getattr(f, name) for name in judge_lib.CONTINUOUS}
  scores = judge_lib.accuracy(reading, f, np.full((4, 4), 0.1))
  assert scores["class_id"] == 1 and scores["color1"] == pytest.approx(2 / 3)
  assert scores["azimuth"] == pytest.approx(3 / 4)
  assert scores["size"] == pytest.approx(1)


def test_loss_ignores_what_is_not_seen_and_is_right_by_hand():
  f = rows(2, style=0, hat=0)
  targets = {name: jnp.asarray(getattr(f, name))
             for name in (*judge_lib.CATEGORIES, "azimuth", *judge_lib.CONTINUOUS)}
  outputs = {name: jnp.zeros((2, n)) for name, n in judge_lib.CATEGORIES.items()}
  outputs["azimuth"] = jnp.zeros((2, judge_lib.AZIMUTH_BINS))
  outputs |= {name: targets[name][:, None] for name in judge_lib.CONTINUOUS}
  seen = {name: jnp.array([True, False]) for name in targets}
  loss, _ = judge_lib.factor_loss(outputs, targets, seen)
  # Uniform guesses, the rest right.
  by_hand = sum(np.log(n) for n in (*judge_lib.CATEGORIES.values(), judge_lib.AZIMUTH_BINS))
  assert float(loss) == pytest.approx(by_hand, rel=1e-5)
  outputs["class_id"] = outputs["class_id"].at[1].set(100 * jnp.arange(10.0))  # unseen: no change
  assert float(judge_lib.factor_loss(outputs, targets, seen)[0]) == pytest.approx(by_hand, rel=1e-5)
  some = {name: outputs[name] for name in ("color1", "pattern", "y")}
  loss, right = judge_lib.factor_loss(some, targets, seen)
  assert float(loss) == pytest.approx(np.log(11 * 5), rel=1e-5)
  assert set(right) == {"color1", "pattern"}


def test_azimuth_is_the_mean_of_the_likeliest_three_bins():
  """And the loss is least where the logits say what the angle is, halves of two bins included."""
  angle = jnp.array([0.0, 3 * np.pi / 8, -np.pi + 0.1, 2.0])
  names = (*judge_lib.CATEGORIES, *judge_lib.CONTINUOUS)
  seen = dict.fromkeys((*names, "azimuth"), jnp.zeros(4, bool)) | dict(azimuth=jnp.ones(4, bool))
  targets = dict.fromkeys(names, jnp.zeros(4, int)) | dict(azimuth=angle)
  outputs = {name: jnp.zeros((4, judge_lib.CATEGORIES.get(name, 1))) for name in names}
  loss = jax.jit(jax.value_and_grad(
    lambda logits: judge_lib.factor_loss(outputs | dict(azimuth=logits), targets, seen)[0]))
  logits = jnp.zeros((4, judge_lib.AZIMUTH_BINS))
  for _ in range(400):
    logits -= 8 * loss(logits)[1]
  np.testing.assert_allclose(judge_lib.likeliest_angle(np.asarray(logits)), angle, atol=0.05)
  front_or_back = np.log([[0.3, 0.1, 0.01, 0.1, 0.28, 0.01, 0.01, 0.09]])
  assert abs(judge_lib.likeliest_angle(front_or_back)[0]) < 0.1  # not between the two
  # A mirrored picture is the mirrored pose: one that equals its mirror image has no side.
  judge = judge_lib.FactorJudge(8, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
  both, other = (judge_lib.read_both_ways(judge, y) for y in (x, x[:, :, ::-1]))
  np.testing.assert_allclose(both["azimuth"][:, 1:], other["azimuth"][:, :0:-1], atol=1e-5)
  np.testing.assert_allclose(both["x"], -other["x"], atol=1e-5)


def test_judge_round_trip_and_foreign_files(tmp_path):
  judge = judge_lib.FactorJudge(8, rngs=nnx.Rngs(0))
  judge_lib.save_judge(judge, tmp_path / "judge.safetensors", {"scene": 0.5})
  loaded, scores = judge_lib.load_judge(tmp_path / "judge.safetensors")
  assert scores == {"scene": 0.5}
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
  before, after = judge_lib.read(judge, images, batch=4), judge_lib.read(loaded, images, batch=4)
  np.testing.assert_allclose(after["size"], before["size"], atol=2e-2)  # stored in float16
  assert before["class_id"].shape == (3,)

  with pytest.raises(UserError, match="cannot read the judge"):
    judge_lib.load_judge(tmp_path / "nothing.safetensors")
  (tmp_path / "cut.safetensors").write_bytes(
    (tmp_path / "judge.safetensors").read_bytes()[:500])
  with pytest.raises(UserError, match="cannot read the judge"):
    judge_lib.load_judge(tmp_path / "cut.safetensors")
