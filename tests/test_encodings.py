"""What a step asks image encoder and MFI-Encoder: once, and the same as asked one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny

from cc_jax.bases.base import load_base
from cc_jax.customcontrast.build import build_customcontrast
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.customcontrast.qformer import TextualQformer, VisualQformer
from cc_jax.training.encodings import encode_subjects
from cc_jax.training.noise import StepNoise, share_timestep
from cc_jax.training.setup import adapter_configs, make_step_context
from cc_jax.training.step_context import StepContext, to_unit_range

KEEP = np.array([1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], bool)  # two groups of eight
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def asked(tiny_folder):
  """(context, model, batch, noise) of 16 samples."""
  config = tiny.tiny_config(tiny_folder)
  config.train.batch_size = 16
  base = load_base(tiny_folder)
  definition, *params = build_customcontrast(base, *adapter_configs(config))
  context, rng = make_step_context(config, definition, base), np.random.default_rng(0)
  batch = {name: rng.integers(0, 256, (16, tiny.IMAGE, tiny.IMAGE, 3), dtype=np.uint8)
           for name in ("reference", "positive")}  # fmt: skip
  t = share_timestep(jnp.asarray(rng.permutation(1000)[:16], jnp.int32), jnp.asarray(KEEP))
  keys = jax.random.split(jax.random.key(0), 16)
  return context, context.model(*params), batch, StepNoise(t, jnp.asarray(KEEP), KEEP, keys)


@pytest.fixture(scope="module")
def one_by_one(asked):
  _, model, batch, noise = asked

  @jax.jit
  def ask(reference, positive):
    features, embed = model.image_features(to_unit_range(reference))
    others, _ = model.image_features(to_unit_range(positive))
    positive = model.encode(others, noise.t)
    return (model.encode(features, noise.t, noise.keep_image), model.encode(features, noise.t),
            (positive.textual_cls, positive.textual_tokens), embed)  # fmt: skip

  return ask(batch["reference"], batch["positive"])


def assert_same(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("rows_per_device, microbatch", [(16, False), (12, False), (16, True)])
def test_all_sets_in_one_batch(asked, one_by_one, monkeypatch, rows_per_device, microbatch):
  """Eight, four and one neighbour share the answer for no image."""
  calls = []
  asked_of = (CustomContrast, "image_features"), (TextualQformer, ""), (VisualQformer, "")
  for cls, name in asked_of:
    function = getattr(cls, name or "__call__")
    monkeypatch.setattr(
      cls, name or "__call__", lambda self, x, *rest, f=function, n=name or cls.__name__: (
        calls.append((n, len(x))), f(self, x, *rest))[1])
  monkeypatch.setattr(StepContext, "rows_per_device", lambda *_: rows_per_device)
  context, model, batch, noise = asked
  ask = jax.jit(lambda batch: encode_subjects(context, model, batch, noise, microbatch=microbatch))
  assert_same(tuple(ask(batch)), one_by_one)
  answers = 16 if microbatch else {16: 2, 12: 4}[rows_per_device]
  assert calls == [("image_features", 32), ("TextualQformer", 32 + answers),
                   ("VisualQformer", 16 + answers)]  # fmt: skip


def test_what_no_loss_needs_is_not_asked(asked, one_by_one):
  context, model, batch, noise = asked
  config = ml_collections.ConfigDict(context.config)
  config.objective.lambda_macl = 0.0

  @functools.partial(jax.jit, static_argnums=0)
  def ask(config, batch):
    return encode_subjects(dataclasses.replace(context, config=config), model, batch, noise)

  assert ask(ml_collections.FrozenConfigDict(config), batch).positive is None
  config.objective.lambda_cscl = 0.0
  found = ask(ml_collections.FrozenConfigDict(config), batch)
  assert_same(found.shown, one_by_one[0])


def test_those_that_drop_their_image_share_a_timestep():
  t = jnp.arange(100, 116)
  shared = share_timestep(t, jnp.asarray(KEEP))
  # By hand: of the first eight the second, fourth and fifth drop theirs, of the others one.
  expected = [100, 101, 102, 101, 101, *range(105, 116)]
  assert shared.tolist() == expected
  assert share_timestep(t[:3], jnp.zeros(3, bool)).tolist() == [100, 101, 102]  # no neighbours
