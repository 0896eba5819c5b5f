"""The training step and loop on the tiny base: kills, skipped updates, every objective, errors."""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath
from etils.epath import backend
from jax.sharding import AbstractMesh
from orbax.checkpoint import v1 as ocp
from PIL import Image

import data_pipeline
from cc_jax import evaluate
from cc_jax import train as train_command
from cc_jax.bases.base import Base, abstract_base, load_base
from cc_jax.customcontrast.adapter_file import load_adapter
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.customcontrast.model import CustomContrast
from cc_jax.customcontrast.param_groups import group_by_module
from cc_jax.errors import UserError
from cc_jax.objectives import macl as macl_lib
from cc_jax.parallel import rules
from cc_jax.parallel.mesh import AXES, make_mesh, replicate, shard_batch
from cc_jax.parallel.rules import shard_params
from cc_jax.training import loop, prompt_sensitivity, step
from cc_jax.training.accumulation import (
  accumulate_gradients,
  merge_microbatches,
  split_microbatches,
)
from cc_jax.training.checkpoint import Checkpoints
from cc_jax.training.contrastive import Embeddings, compare_embeddings, contrastive_embeddings
from cc_jax.training.encodings import SubjectEncodings
from cc_jax.training.inputs import sample_latents
from cc_jax.training.loop import Callbacks, train
from cc_jax.training.losses import diffusion_objective, subject_weights, total_loss
from cc_jax.training.noise import keep_conditions, sample_step_noise, sample_timesteps
from cc_jax.training.parameter_table import parameter_table
from cc_jax.training.prompt_sensitivity import (
  make_prompt_sensitivity,
  relative_rise,
  wrong_nouns,
  wrong_phrases,
)
from cc_jax.training.run import save_after_error
from cc_jax.training.setup import adapter_configs, base_options, make_step_context, step_seed
from cc_jax.training.step_context import to_unit_range
from cc_jax.training.telemetry import read_log
from data_pipeline.errors import DataError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compile")


# A run that is killed and started again equals one that is not.


# What is compiled as a whole is compiled once, with these, for all tests and processes.
FLAGS = {
  "train.steps": 8,
  "train.save_every": 3,
  "train.log_every": 2,
  "train.prompt_sensitivity_every": 4,
  "objective.cscl_frame": "cross_frame",
  "objective.macl_scaling": "soft_target",
  "objective.macl_symmetric": True,
  "objective.min_snr_gamma": 5.0,
}


def run(base, workdir, cache, kill="", flags=None):
  environment = {
    **os.environ,
    "KILL": kill,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }
  return subprocess.run(
    [
      sys.executable,
      Path(__file__).parent / "run_train.py",
      base,
      workdir,
      *(f"--config.{key}={value}" for key, value in {**FLAGS, **(flags or {})}.items()),
    ],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.slow
def test_killed_runs_go_on_bit_for_bit(setup, loader, tmp_path, quick_compile):
  """The run that is not killed is made in this process, the others each in one of its own."""
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  train(setup.config, whole)

  base = tmp_path / "base"  # the same, and something in it that training has no use for
  shutil.copytree(setup.config.base, base)
  (base / "safety_checker").mkdir()
  between = run(base, killed, quick_compile, kill="term:4")
  assert between.returncode == 143, between.stderr
  assert f"{base}: not used: safety_checker/" in between.stderr  # C2
  assert "SIGTERM: step 5 is saved" in between.stdout  # the step that ran when it came
  assert sorted(os.listdir(killed / "checkpoints")) == ["3", "5"]
  during = run(base, killed, quick_compile, kill="save:6")
  assert during.returncode == -signal.SIGKILL, during.stderr
  assert sorted(p.split(".")[0] for p in os.listdir(killed / "checkpoints")) == ["3", "5", "6"]
  assert not (killed / "checkpoints" / "6").exists()  # there is only the unfinished one
  after = run(base, killed, quick_compile)
  assert after.returncode == 0, after.stderr
  same_to_the_bit(whole, killed)
  logs = read_log(whole / "metrics.jsonl")
  assert [line["step"] for line in logs] == [2, 4, 4, 6, 8, 8]
  assert {"gap/class", "gap/scene"} <= logs[2].keys()


@pytest.mark.slow
def test_twenty_kills(setup, loader, tmp_path, quick_compile):
  """SIGKILL and SIGTERM at every third step and in the middle of every kind of save."""
  steps = {"train.steps": 70}
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  config = setup.config.copy_and_resolve_references()
  config.update_from_flattened_dict(steps)
  train(config, whole)
  kinds = ("step", "term", "save", "termsave")
  codes = {"step": (-signal.SIGKILL,), "save": (-signal.SIGKILL,), "term": (143,)}
  for number in range(20):
    kind = kinds[number % 4]
    at = 3 * (number + 1)  # a step at which a save is due, which the last kill did not reach
    died = run(config.base, killed, quick_compile, kill=f"{kind}:{at}", flags=steps)
    assert died.returncode in codes.get(kind, (143,)), (kind, at, died.stderr)
  after = run(config.base, killed, quick_compile, flags=steps)
  assert after.returncode == 0, after.stderr
  same_to_the_bit(whole, killed)


def same_to_the_bit(whole, killed):
  """Parameters, averages, optimizer, step, log and adapter of two finished runs."""
  step = max(map(int, os.listdir(whole / "checkpoints")))
  a, b = (ocp.load(path / "checkpoints" / str(step)) for path in (whole, killed))
  assert a.keys() == b.keys()
  parts = {key.split("/")[0] for key in a}
  assert parts == {"trainable", "opt_state", "ema", "step", "bad_steps"}
  for key in a:
    assert np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key
  logs = [read_log(path / "metrics.jsonl") for path in (whole, killed)]
  assert logs[0] == logs[1]
  x, y = (load_adapter(path / "adapter.safetensors").tensors for path in (whole, killed))
  assert x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x)
  assert all(np.array_equal(x[key], a[f"ema/{key}"]) for key in x)


@pytest.mark.slow
def test_warm_start_from_an_ip_adapter(setup, loader, tmp_path, quick_compile):
  """Training starts from the file's values and reports; a run that goes on needs no file."""
  rng = np.random.default_rng(0)
  names = [name for name in setup.trainable if name.endswith("to_k_visual.kernel")]
  file, stored = tmp_path / "ip.safetensors", {}
  for number, name in enumerate(sorted(names, key=lambda n: "mid_block" in n)):  # down, up, mid
    width, channels = setup.trainable[name].shape
    for part in "kv":
      value = 3 + rng.standard_normal((channels, width)).astype(np.float32)
      stored[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = value
  safetensors.numpy.save_file(stored, file)
  config = setup.config.copy_and_resolve_references()
  config.train.warm_start = str(file)
  state = train(config, tmp_path / "run")
  for number, name in enumerate(sorted(names, key=lambda n: "mid_block" in n)):
    wanted = stored[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"].T
    assert np.abs(np.asarray(state.trainable[name]) - wanted).max() < 0.1
  report = (tmp_path / "run" / "warm_start.txt").read_text()
  assert f"{len(stored)} of {len(stored)} tensors used" in report
  file.unlink()
  again = train(config, tmp_path / "run")
  assert np.array_equal(again.trainable[names[0]], state.trainable[names[0]])
  with pytest.raises(UserError, match="ip.safetensors is no file"):
    train(config, tmp_path / "another")


# The step.


@pytest.fixture
def loader(monkeypatch):
  """The loader's place is taken by tests/tiny.py's batches; the set holds steps with a NaN."""
  bad = set()

  def make_loader(_, tokenizer, *, batch_size, seed, start_step=0, **kwargs):
    batches = tiny.batches(tokenizer, batch_size, seed=seed, start=start_step)
    for number, batch in enumerate(batches, start=start_step):
      if number in bad and seed == 0:
        batch["target"][:] = np.nan
      yield batch

  monkeypatch.setattr(data_pipeline, "make_loader", make_loader)
  return bad


@dataclasses.dataclass
class Setup:
  config: ml_collections.ConfigDict
  base: Base
  definition: object
  trainable: dict
  frozen: dict

  def context(self, **changes):
    config = self.config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return make_step_context(config, self.definition, self.base)

  def state(self):
    return step.init_state(jax.tree.map(jnp.copy, self.trainable), self.config)

  def batches(self):
    return tiny.batches(self.base.tokenizers[0], 4)


@pytest.fixture(scope="module")
def setup(tiny_folder):
  config = tiny.tiny_config(tiny_folder)
  config.update_from_flattened_dict(FLAGS)
  base = load_base(tiny_folder)
  parts = build_customcontrast(base, *adapter_configs(config))
  return Setup(config, base, *parts)


def test_the_adapter_is_on_the_device_once(setup, tmp_path):  # C9
  """Weights, EMA and Adam's two averages; what they were initialised from is gone."""
  before = {id(array) for array in jax.live_arrays()}
  with contextlib.ExitStack() as lock:
    run = loop.set_up(setup.config, epath.Path(tmp_path), lock)
    shapes = [x.shape for x in jax.live_arrays() if id(x) not in before]
    frozen = [x.shape for x in jax.tree.leaves(run.frozen)]
    run.log.close()
    run.checkpoints.close()
  for name, value in run.state.trainable.items():
    if not value.shape:  # a gate; counters have no dimension either
      continue
    same = sum(x.shape == value.shape for x in run.state.trainable.values())
    assert shapes.count(value.shape) - frozen.count(value.shape) == 4 * same, name


@pytest.fixture(scope="module")
def compiled(setup, quick_compile):
  """The whole step, as `train` compiles it."""
  context = setup.context()
  mesh = make_mesh(setup.config.mesh, 4)
  frozen = replicate(setup.frozen, mesh)
  state = replicate(setup.state(), mesh)
  batch = shard_batch(next(setup.batches()), mesh)
  seed = shard_params(step_seed(setup.config), mesh)
  function = step.make_train_step(context, mesh, state, frozen)
  function = function.lower(state, frozen, batch, seed).compile()

  def one(state, frozen, batch, seed=seed):
    state, frozen = replicate((state, frozen), mesh)
    return function(state, frozen, shard_batch(batch, mesh), seed)

  return one


def test_a_step_is_a_function_of_its_arguments_and_leaves_the_base_alone(setup, compiled):
  before = jax.tree.map(np.array, setup.frozen)
  batch = next(setup.batches())
  one, metrics = compiled(setup.state(), setup.frozen, batch)
  two, again = compiled(setup.state(), setup.frozen, batch)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, (one, metrics), (two, again)))
  # Another step has other noise, and so has another seed, in the same program.
  other = shard_params(np.uint32(1), make_mesh(setup.config.mesh, 4))
  assert compiled(setup.state(), setup.frozen, batch, other)[1]["loss/diffusion"] != metrics[
    "loss/diffusion"]
  later = setup.state()._replace(step=jnp.asarray(1, jnp.int32))
  assert compiled(later, setup.frozen, batch)[1]["loss/diffusion"] != metrics["loss/diffusion"]
  assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.array, setup.frozen)))

  objective = setup.config.objective
  total = (
    metrics["loss/diffusion"]
    + objective.lambda_cscl * metrics["loss/cscl"]
    + objective.lambda_macl * metrics["loss/macl"]
  )
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
  # The gates start at 0, so that only they, and what S+ and contrast reach, can move at first.
  moved = {k for k, v in one.trainable.items() if not np.array_equal(v, setup.trainable[k])}
  assert any(k.startswith("mfi_encoder") for k in moved) and any(k.endswith("gate") for k in moved)


def test_a_nan_batch_changes_nothing_but_the_counters(setup, compiled):
  state, _ = compiled(setup.state(), setup.frozen, next(setup.batches()))
  before = jax.tree.map(np.array, state)
  batch = next(setup.batches())
  batch["target"][0, 0, 0, 0] = np.nan
  state, metrics = compiled(state, setup.frozen, batch)
  assert np.isnan(metrics["loss"]) and metrics["bad_steps"] == 1 and metrics["norm/update"] == 0
  for name in ("trainable", "opt_state", "ema"):
    old, new = getattr(before, name), getattr(state, name)
    assert jax.tree.all(jax.tree.map(np.array_equal, old, jax.tree.map(np.array, new))), name
  assert state.step == 2
  state, metrics = compiled(state, setup.frozen, batch)
  assert metrics["bad_steps"] == 2
  state, metrics = compiled(state, setup.frozen, next(setup.batches()))
  assert metrics["bad_steps"] == 0 and np.isfinite(metrics["loss"])


ALTERNATIVES = [
  *({"macl_scaling": scaling} for scaling in macl_lib.SCALINGS),
  {"macl_symmetric": True},
  {"macl_pooling": "per_token"},
  {"cscl_frame": "cross_frame"},
  {"lambda_cscl": 0.0},
  {"lambda_macl": 0.0},
]


@pytest.mark.slow
def test_every_objective_trains_two_steps(setup, monkeypatch):
  """One compilation for all: the encoder runs once, a switch takes the objective's branch.

  The frozen image encoder is replaced by the pictures themselves; the diffusion loss, which these
  choices do not touch, is left out. `compiled` has the whole step with four of them.
  """
  defaults = {f"objective__{k}": v for k, v in tiny.subjects3d.get_config().objective.items()}
  contexts = [
    setup.context(**defaults | {f"objective__{k}": v for k, v in changes.items()})
    for changes in ALTERNATIVES
  ]

  def look(model, pixels):
    flat = pixels.reshape(len(pixels), -1)
    width = model.image_tokens * model.image_width
    return flat[:, :width].reshape(-1, model.image_tokens, model.image_width) - 0.5, flat[:, -10:]

  def contrast(context, batch, subjects):
    objective = context.config.objective
    embeddings = contrastive_embeddings(objective, subjects)
    return compare_embeddings(objective, embeddings, batch["subject_id"], context.contrast)[0]

  def loss(trainable, frozen, batch, number):
    model = contexts[0].model(trainable, frozen)
    t = 100 + 200 * jnp.arange(len(batch["slot"]))
    reference, embed = look(model, to_unit_range(batch["reference"]))
    positive, _ = look(model, to_unit_range(batch["positive"]))
    subjects = SubjectEncodings(None, model.encode(reference, t), model.encode(positive, t), embed)
    value = jax.lax.switch(
      number, [functools.partial(contrast, c, batch, subjects) for c in contexts]
    )
    return value, {"loss": value}

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  update = jax.jit(lambda *args: step.update(setup.config.train, *args))
  losses = []
  for number, changes in enumerate(ALTERNATIVES):
    state, batches = setup.state(), setup.batches()
    for _ in range(2):
      gradients, metrics = gradient(state.trainable, setup.frozen, next(batches), number)
      state, metrics = update(state, gradients, metrics)
      assert metrics["bad_steps"] == 0 and metrics["norm/update"] > 0, changes
      losses += [float(metrics["loss"])]
  assert len(set(losses)) == 2 * len(ALTERNATIVES), losses  # no choice is ignored


@pytest.mark.slow  # one of run_sharded.py's meshes has two parts, and the others one
def test_gradients_do_not_depend_on_the_number_of_parts(setup):
  """Sixteen samples at once or four by four: condition dropout, noise and the negatives stay."""
  shares = dict(drop_text=0.1, drop_image=0.1, drop_both=0.1, lambda_cscl=1.0, lambda_macl=1.0)
  shares |= dict(cscl_temperature=0.3, macl_temperature=0.3, macl_soft_temperature=0.3)
  changes = {f"objective__{k}": v for k, v in shares.items()} | {"train__batch_size": 16}
  one, four = (setup.context(**changes, train__grad_accum_steps=n) for n in (1, 4))
  rng = np.random.default_rng(2)  # with 1, one bias nearly cancels (1.3e-5 on one processor)
  # As in run_sharded.py: gates are open, and queries far apart. No gradient is a sum that nearly
  # cancels, since that would show the rounding of a sum in another order.
  trainable = {
    key: np.asarray(value) + (1 if "queries" in key else 0.3) * rng.normal(size=value.shape)
    for key, value in sorted(setup.trainable.items())
  }
  trainable = {key: value.astype(np.float32) for key, value in trainable.items()}
  batch = next(tiny.batches(setup.base.tokenizers[0], 16))
  key = jax.random.key(1)
  draws = sample_step_noise(one, key, 16)
  kept = set(zip(draws.keep_text.tolist(), draws.keep_image.tolist()))
  assert kept == {(a, b) for a in (True, False) for b in (True, False)}

  whole = jax.value_and_grad(lambda *a: total_loss(one, *a), has_aux=True)
  (_, expected), gradients = jax.jit(whole)(trainable, setup.frozen, batch, key)
  (_, metrics), ours = jax.jit(lambda *a: accumulate_gradients(four, *a))(
    trainable, setup.frozen, batch, key
  )
  assert metrics.keys() == expected.keys()
  for name in metrics:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
  norms = {name: np.linalg.norm(gradient) for name, gradient in gradients.items()}
  wrong = {
    name: np.linalg.norm(ours[name] - gradient) / norms[name]
    for name, gradient in gradients.items()
  }
  assert min(norms.values()) > 1e-7 * max(norms.values())  # none is truly zero
  # The worst is a to_k_visual's, whose summands nearly cancel; the others are below 2e-6.
  assert max(wrong.values()) < 2e-5, sorted(wrong.items(), key=lambda kv: -kv[1])[:3]
  assert np.median([*wrong.values()]) < 2e-6

  update = lambda *a: step.train_step(four, *a, np.uint32(0))[0].trainable  # noqa: E731
  assert jax.eval_shape(update, setup.state(), setup.frozen, batch).keys() == trainable.keys()


@pytest.mark.slow
def test_what_is_computed_again_does_not_change_the_gradient(setup):
  """The diffusion loss through UNet and text encoders; what is kept for its gradient shrinks."""
  unet = ("none", "dots", "full", "dots", "full")
  contexts = setup.context(), setup.context(train__remat_unet=unet, train__remat_text="full")
  rng = np.random.default_rng(1)
  trainable = {
    key: np.asarray(value + 0.3 * rng.normal(size=value.shape), np.float32)
    for key, value in sorted(setup.trainable.items())
  }
  draws = sample_step_noise(contexts[0], jax.random.key(1), 4)
  batch = next(setup.batches())

  def loss(context, trainable):
    model = context.model_for_gradient(trainable, setup.frozen)
    features, _ = model.image_features(to_unit_range(batch["reference"]))
    shown = model.encode(features, draws.t, draws.keep_image)
    return diffusion_objective(context, model, batch, shown, draws)[0]

  gradients, kept = [], []
  for context in contexts:
    of = functools.partial(loss, context)
    gradients.append(jax.jit(jax.grad(of))(trainable))
    residuals = jax.eval_shape(lambda t, of=of: jax.vjp(of, t)[1], trainable)
    kept.append(sum(x.size for x in jax.tree.leaves(residuals)))
  for key, value in gradients[0].items():
    error = np.linalg.norm(gradients[1][key] - value)
    assert error <= 1e-4 * np.linalg.norm(value) + 1e-7, key
  assert kept[1] < 0.8 * kept[0], kept


def test_over_fsdp_neither_activations_nor_gathered_weights_are_kept(setup, monkeypatch):
  """As much as without a mesh: each way to compute again would undo the other one."""
  small = tuple(rule._replace(min_size=2) for rule in rules.RULES)
  monkeypatch.setattr(rules, "RULES", small)
  batch, key = next(setup.batches()), jax.random.key(1)
  inside = {x.shape for x in setup.frozen.values()}

  def kept(remat, mesh):
    context = setup.context(train__remat_unet=(remat,), train__remat_text=remat)
    context = dataclasses.replace(context, mesh=mesh)
    of = context.remat_all_gathers(functools.partial(total_loss, context))
    back = jax.eval_shape(
      lambda t, f: jax.vjp(lambda t: of(t, f, batch, key), t, has_aux=True)[1],
      setup.trainable, setup.frozen)
    return sum(x.size for x in jax.tree.leaves(back) if x.shape not in inside)

  mesh = AbstractMesh((1, 2, 1), AXES)
  with jax.sharding.use_abstract_mesh(mesh):
    cut = {remat: kept(remat, mesh) for remat in ("none", "full")}
  whole = {remat: kept(remat, None) for remat in ("none", "full")}
  assert cut["none"] < 1.1 * whole["none"] and cut["full"] < 1.1 * whole["full"]
  assert cut["full"] < 0.7 * cut["none"]


def test_microbatches_are_split_and_merged():
  x = np.arange(24).reshape(12, 2)
  parts = split_microbatches({"x": x}, 3)["x"]
  assert parts.shape == (3, 4, 2)
  np.testing.assert_array_equal(parts[1], x[1::3])
  layered = np.arange(48).reshape(2, 12, 2)
  stacked = split_microbatches(jnp.moveaxis(layered, 1, 0), 3)
  stacked = jnp.moveaxis(stacked, 2, 1)  # as a scan stacks them
  merged = merge_microbatches(Embeddings(visual_cls=parts, anchors=stacked))
  np.testing.assert_array_equal(merged.visual_cls, x)
  np.testing.assert_array_equal(merged.anchors, layered)


def test_conditions_are_dropped_at_their_shares():
  objective = ml_collections.ConfigDict(dict(drop_text=0.1, drop_image=0.2, drop_both=0.3))
  text, image = keep_conditions(jax.random.key(0), 20_000, objective)
  shares = [np.mean(x) for x in (~text & image, text & ~image, ~text & ~image, text & image)]
  np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.015)


def test_timesteps_move_towards_noise():
  t = np.asarray(sample_timesteps(jax.random.key(0), 40_000, 1000, 1.0))
  assert t.min() == 0 and t.max() == 999 and abs(t.mean() - 499.5) < 5
  t = np.asarray(sample_timesteps(jax.random.key(0), 40_000, 1000, 3.0))
  # u' = 3u / (1 + 2u): half of the draws lie above 3/4.
  assert t.min() >= 0 and t.max() == 999 and abs(np.median(t) - 750) < 5


def test_the_subject_weighs_more():
  masks = np.zeros((2, 4, 4), np.uint8)
  masks[0, :2, :2] = 255
  weights = subject_weights(jnp.asarray(masks), (4, 4), 3.0)
  np.testing.assert_allclose(weights, 1 + 3 * (masks / 255), rtol=1e-6)
  assert subject_weights(jnp.asarray(masks), (2, 2), 0.0) is None
  half = subject_weights(jnp.asarray(masks), (2, 2), 1.0)
  # A triangle two pixels wide on either side: 3/7 + 3/7 of it lie on the mask, in each direction.
  np.testing.assert_allclose(half[0, 0, 0], 1 + (6 / 7) ** 2, rtol=1e-6)
  assert np.all(half[1] == 1)


def test_latents_are_a_sample_of_the_posterior_in_the_unets_units():
  class Vae:
    config = ml_collections.ConfigDict({"scaling_factor": 3.0, "shift_factor": 0.25})

    def encode(self, x):
      return x, jnp.full_like(x, 2 * np.log(0.1))

  images = jnp.tile(jnp.asarray([0, 255, 51], jnp.uint8), (4, 32, 32, 1))
  z = sample_latents(Vae(), images, jax.random.split(jax.random.key(0), 4))
  expected = (np.asarray([-1, 1, -0.6]) - 0.25) * 3
  np.testing.assert_allclose(z.mean((0, 1, 2)), expected, atol=0.02)
  np.testing.assert_allclose(z.std((0, 1, 2)), 0.3, atol=0.02)


# The loop.


def test_stops_after_max_bad_steps_with_the_good_state_saved(setup, loader, tmp_path, capsys):
  """C12: skipped steps change no weights, so what the device holds is good."""
  loader.update({1, 3, 4})
  config = setup.config.copy_and_resolve_references()
  config.train.update(max_bad_steps=2, save_every=3, prompt_sensitivity_every=0, log_every=1)
  # When the metrics of step 5 are read, step 6 has been done.
  with pytest.raises(UserError, match="2 steps in a row up to step 5; .*step 6 is saved, and"):
    train(config, tmp_path)
  assert "step 2 is skipped, its loss or gradient is not finite" in capsys.readouterr().out
  bad = tmp_path / "bad_steps"
  assert sorted(os.listdir(bad)) == [f"000000{step}.process0.json" for step in (2, 4, 5)]
  found = json.loads((bad / "0000004.process0.json").read_text())
  assert found["subject_id"] == [0, 0, 2, 2] and len(found["class_id"]) == 4
  assert found["metrics"]["norm/gradient/unet"] == found["metrics"]["loss"] == "nan"
  # Neither holds a NaN though step 2 was bad.
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "6"]
  saved = {step: ocp.load(tmp_path / "checkpoints" / step) for step in ("3", "6")}
  assert all(np.isfinite(np.asarray(x)).all() for part in saved.values() for x in part.values())
  assert saved["6"]["step"] == 6 and saved["6"]["bad_steps"] == 0
  changed = [not np.array_equal(saved["3"][key], saved["6"][key]) for key in saved["3"]]
  assert any(changed)  # step 6 was a good one
  adapter = load_adapter(tmp_path / "adapter.safetensors")
  assert adapter.notes["steps"] == "6"
  assert all(np.array_equal(x, saved["6"][f"ema/{key}"]) for key, x in adapter.tensors.items())
  loader.clear()  # the data were mended, and more patience asked for: the same command goes on
  config.train.max_bad_steps = 3
  seen = []
  before, live = {id(x) for x in jax.live_arrays()}, []

  def on_sample(config, base, model, file):
    seen.append(file.name)
    live.extend(x.shape for x in jax.live_arrays() if id(x) not in before)

  callbacks = Callbacks(on_sample, lambda *a: seen.append("end"))
  config.train.update(sample_every=7, keep_every=8)  # drawn when nothing is saved
  state = train(config, tmp_path, callbacks, profile_steps=(7, 8))
  out = capsys.readouterr().out
  assert "max_bad_steps was" in out and "largest parts of a step: " in out
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert state.step == 8 and seen == ["0000007.png", "end"]
  wide = state.trainable["mfi_encoder.textual.proj_in.kernel"].shape
  same = sum(x.shape == wide for x in state.trainable.values())
  assert live.count(wide) == 4 * same  # weights, EMA, Adam's two: what the plan counts (C9)
  for name in ("adapter", "adapter-0000008"):  # what train.keep_every keeps has its own file
    assert load_adapter(tmp_path / f"{name}.safetensors").notes["steps"] == "8"
  steps = [line["step"] for line in read_log(tmp_path / "metrics.jsonl")]
  assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def quick_step(setup, loader, monkeypatch):
  """The step's place is taken by one that adds 1 to every weight; the set holds steps that fail."""
  fails = set()
  add = jax.jit(
    lambda state: state._replace(
      trainable=jax.tree.map(lambda x: x + 1, state.trainable),
      ema=jax.tree.map(lambda x: x + 1, state.ema), step=state.step + 1),
    donate_argnums=0)

  def compile_step(run, batch, seed, profile):
    metrics = {key: jnp.zeros(()) for key in ("loss", "bad_steps", "learning_rate")}

    def one(state, frozen, batch, seed):
      number = int(jax.device_get(state.step)) + 1
      state = add(state)
      if number in fails:
        raise RuntimeError("RESOURCE_EXHAUSTED")
      return state, metrics

    return one

  def build(*_, **__):  # the base is read, and the adapter initialised, once for all
    return setup.definition, jax.tree.map(jnp.copy, setup.trainable), setup.frozen

  monkeypatch.setattr(loop, "load_base", lambda *_, **__: setup.base)
  monkeypatch.setattr(loop, "build_customcontrast", build)
  monkeypatch.setattr(loop, "compile_step", compile_step)
  monkeypatch.setattr(
    "cc_jax.training.setup.make_prompt_sensitivity", lambda *_: lambda *_: {"gap/class": 0.5})
  return fails


class Killed(BaseException):
  """Stands for SIGKILL: nobody catches it."""


def test_what_ends_a_run_leaves_its_state_saved(setup, quick_step, tmp_path, monkeypatch, capsys):
  """P13, P12, C6: errors of data and drawing, Ctrl-C, a kill after the save; each run goes on."""
  config = setup.config.copy_and_resolve_references()
  config.train.update(log_every=1, save_every=2, sample_every=2, prompt_sensitivity_every=2)
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  train(config, whole, Callbacks(lambda *_: None))
  seen = []

  def saved():
    steps = load_adapter(workdir / "adapter.safetensors").notes["steps"]
    return steps, [int(name) for name in sorted(os.listdir(workdir / "checkpoints"))][-1]

  def kill(*_):
    raise Killed

  def draw(*arguments):
    step = int(arguments[-1].stem)
    seen.append(step)
    if step == 4:
      raise UserError("the sampler does not fit")
    if step == 6:
      raise KeyboardInterrupt

  callbacks = Callbacks(draw)
  with monkeypatch.context() as patch:  # between save and evaluation: C6 wants the adapter by then
    patch.setattr("cc_jax.training.setup.make_prompt_sensitivity", lambda *_: kill)
    with pytest.raises(Killed):
      train(config, workdir, callbacks)
  assert saved() == ("2", 2)

  real = data_pipeline.make_loader

  def cut(*args, start_step=0, **kwargs):
    for number, batch in enumerate(real(*args, start_step=start_step, **kwargs), start_step):
      if number == 3 and kwargs["seed"] == config.seed:
        raise DataError("b/1.jpg is cut off; save it again")
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(data_pipeline, "make_loader", cut)
    with pytest.raises(DataError, match="^b/1.jpg is cut off; save it again; step 3 is saved, and"):
      train(config, workdir, callbacks)
    assert saved() == ("3", 3)
  with pytest.raises(UserError, match="^the sampler does not fit; step 4 is saved, and the same"):
    train(config, workdir, callbacks)
  assert saved() == ("4", 4)
  capsys.readouterr()
  with pytest.raises(KeyboardInterrupt):
    train(config, workdir, callbacks)
  assert "step 6 is saved, and the same command goes on from there" in capsys.readouterr().out
  train(config, workdir, callbacks)
  assert seen == [4, 6, 8]  # none twice, and the one that the kill has cost
  a, b = (ocp.load(path / "checkpoints" / "8") for path in (whole, workdir))
  assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
  expected = read_log(whole / "metrics.jsonl")
  assert [line["step"] for line in expected if "gap/class" in line] == [2, 4, 6, 8]
  expected.remove({"step": 2, "gap/class": 0.5})
  assert read_log(workdir / "metrics.jsonl") == expected


def test_what_cannot_be_saved_is_said(setup, quick_step, tmp_path, monkeypatch, capsys):
  """P13: a step that fails takes its state along; a save that fails hides no other error."""
  config = setup.config.copy_and_resolve_references()
  config.train.update(save_every=2, sample_every=3, prompt_sensitivity_every=0)
  quick_step.add(4)
  with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
    train(config, tmp_path / "step")
  said = capsys.readouterr().out
  assert "could not be saved (the step that failed has used up the state); step 2 is saved" in said

  def draw(*_):
    raise UserError("the sampler does not fit")

  def full(self, step, *_):
    raise UserError(f"cannot save step {step}: the disk is full")

  quick_step.clear()
  monkeypatch.setattr(Checkpoints, "save", full)
  config.train.save_every = 0
  wanted = r"^the sampler does not fit; the latest steps could not be saved \(cannot save step 3: "
  with pytest.raises(UserError, match=wanted + r"the disk is full\); there is no checkpoint yet$"):
    train(config, tmp_path / "disk", Callbacks(draw))


def test_one_process_of_several_does_not_try_to_save(monkeypatch):
  """P13: the others are in the next step, and a save needs them all."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  stays = "step 3 is saved, and the same command goes on from there"
  stopped = SimpleNamespace(
    last_update=4, unlogged=None, checkpoints=SimpleNamespace(latest_step=lambda: 3))
  lost = "the latest steps could not be saved (of several processes one cannot save alone); "
  assert save_after_error(stopped, DataError("a picture is cut off")) == lost + stays
  stopped.last_update = 3
  assert save_after_error(stopped, DataError("a picture is cut off")) == stays


def bucket(folder):
  """gs:// as a folder of this machine, for all but Orbax and its own storage drivers."""
  local = functools.partial(re.sub, "^gs://", f"{folder}/")

  class Bucket(type(backend.os_backend)):
    def __getattribute__(self, name):
      function = super().__getattribute__(name)
      return lambda *paths, **options: function(*(local(os.fspath(p)) for p in paths), **options)

  return Bucket()


def test_a_workdir_in_a_bucket(setup, loader, tmp_path, monkeypatch):
  """Log, pictures and adapter go there, and nothing into a folder called 'gs:'."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(backend, "tf_backend", bucket(tmp_path / "cloud"))
  here = functools.partial(Checkpoints, tmp_path / "checkpoints")
  monkeypatch.setattr(loop, "Checkpoints", lambda folder, **options: here(**options))
  run = tmp_path / "cloud" / "mine" / "run"
  run.mkdir(parents=True)
  (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # of a lost run
  config = setup.config.copy_and_resolve_references()
  config.train.update(prompt_sensitivity_every=0, sample_every=4)
  picture = Image.new("RGB", (2, 2))
  callbacks = Callbacks(on_sample=lambda *a: evaluate.save(picture, a[-1]))
  state = train(config, "gs://mine/run", callbacks)
  assert [line["step"] for line in read_log(run / "metrics.jsonl")] == [2, 4, 6, 8]
  assert sorted(os.listdir(run / "samples")) == ["0000004.png", "0000008.png"]
  tensors = load_adapter(run / "adapter.safetensors").tensors
  assert all(np.array_equal(value, state.ema[key]) for key, value in tensors.items())
  assert sorted(os.listdir(tmp_path)) == ["checkpoints", "cloud"]


def test_weights_that_are_replicated_by_mistake_stop_the_run(setup, loader, tmp_path, monkeypatch):
  def check_sharding(tree, mesh):
    assert {"state", "frozen"} == tree.keys() and mesh.size == 1
    raise UserError("they are replicated")

  monkeypatch.setattr(loop, "check_sharding", check_sharding)
  with pytest.raises(UserError, match="they are replicated"):
    train(setup.config, tmp_path)
  assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_of_another_base_or_model_is_refused(setup, tmp_path, tiny_folder):
  state = replicate(setup.state(), make_mesh(setup.config.mesh, 4))
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  record = {"base_hash": "0" * 64, "config": setup.config.to_dict(), "telemetry": {}}
  checkpoints.save(1, state, record)
  checkpoints.close()
  with pytest.raises(UserError, match="belongs to the base .* use that base or choose another"):
    train(setup.config, tmp_path)
  config = tiny.tiny_config(tiny_folder, encoder__depth=2, train__steps=8)
  record = {"base_hash": setup.base.hash, "config": setup.config.to_dict(), "telemetry": {}}
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  checkpoints.save(2, state, record)
  checkpoints.close()
  with pytest.raises(UserError, match="encoder.depth=1 and the config now says 2"):
    train(config, tmp_path)


def test_a_workdir_that_cannot_be_written(setup, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write to .*choose another --workdir"):
    train(setup.config, tmp_path / "file" / "run")


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("train.steps", 0, "train.steps is 0; it must be at least 1"),
    ("train.dtype", "float16", "float32, bfloat16"),
    ("train.ema", 1.0, r"lie in \[0, 1\)"),
    ("train.schedule", "linear", "cosine, constant"),
    ("objective.cscl_frame", "other", "same_frame, cross_frame"),
    ("objective.drop_text", 0.95, "sum to at most 1"),
    ("objective.timestep_shift", 0.0, "must be positive"),
    ("objective.subject_weight", -1.0, "not be negative"),
    ("mesh.data", 3, "mesh.data=3, mesh.fsdp=1, mesh.tensor=1, but there are"),
    ("objective.contrast", "other", "auto, naive, tiled, ring"),
    ("objective.tile", 0, "objective.tile is 0"),
    ("train.remat_text", "all", "train.remat_text is 'all'; .*one of none, dots, full"),
    ("train.remat_unet", ("full", "none"), "train.remat_unet=.* has 2 words for 5 blocks"),
    ("train.grad_accum_steps", 3, "=4 does not divide into train.grad_accum_steps=3 parts"),
  ],
)
def test_values_that_make_no_sense(setup, tmp_path, key, value, message, loader):
  config = setup.config.copy_and_resolve_references()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=message):
    train(config, tmp_path)


# Wrong-word gaps.


def captions(setup, *texts_and_nouns):
  from data_pipeline.tokens import encode_prompt

  tokenizer = setup.base.tokenizers[0]
  rows = [encode_prompt(tokenizer, text, noun, 2) for text, noun in texts_and_nouns]
  ids, slots, spans = zip(*rows)
  return {"input_ids": np.stack(ids), "slot": np.asarray(slots), "noun_span": np.stack(spans)}


def test_wrong_words_replace_what_they_should(setup):
  tokenizer = setup.base.tokenizers[0]
  right = captions(
    setup,
    ("a duck on the beach", "duck"),
    ("in the snow a teddy bear", "teddy bear"),
    ("a photo of a duck", "duck"),
  )
  wrong, changed = wrong_nouns(right, [tokenizer], 2)
  expected = captions(
    setup,
    ("a teddy bear on the beach", "teddy bear"),
    ("in the snow a duck", "duck"),
    ("a photo of a teddy bear", "teddy bear"),
  )
  assert changed.all()
  for key in expected:
    np.testing.assert_array_equal(wrong[key], expected[key], err_msg=key)

  scenes = ("beach", "snow", "teddy night")  # the last one has two words
  wrong, changed = wrong_phrases(right, scenes, [tokenizer], 2)
  expected = captions(
    setup,
    ("a duck on the snow", "duck"),
    ("in the teddy night a teddy bear", "teddy bear"),
    ("a photo of a duck", "duck"),
  )
  expected["slot"][1], expected["noun_span"][1] = right["slot"][1] + 1, right["noun_span"][1] + 1
  np.testing.assert_array_equal(changed, [True, True, False])
  for key in expected:
    np.testing.assert_array_equal(wrong[key], expected[key], err_msg=key)


def test_a_wrong_word_that_leaves_no_room_for_s_plus_is_left_out(setup):
  right = captions(setup, ("duck " * 11 + "car", "car"), ("a teddy bear", "teddy bear"))
  assert (right["input_ids"][0] != setup.base.tokenizers[0].pad_token_id).sum() == 13  # + EOS
  wrong, changed = wrong_nouns(right, setup.base.tokenizers, 2)
  np.testing.assert_array_equal(changed, [False, True])
  np.testing.assert_array_equal(wrong["input_ids"][0], right["input_ids"][0])


def test_relative_rise_counts_changed_samples_only():
  rise = relative_rise(
    jnp.asarray([1.0, 2.0, 9.0]), jnp.asarray([2.0, 2.5, 99.0]), jnp.asarray([True, True, False])
  )
  assert float(rise) == 0.5
  assert float(relative_rise(jnp.ones(2), jnp.ones(2), jnp.zeros(2, bool))) == 0.0


def test_a_gap_of_which_nothing_changed_is_left_out(setup, monkeypatch, caplog):
  """C13: 0 would say that the word is ignored."""
  monkeypatch.setattr(prompt_sensitivity, "sample_losses", lambda c, a, f, batch: batch["loss"])
  right = {"loss": np.asarray([1.0, 2.0], np.float32), "slot": np.zeros(2, np.int32)}
  wrong = {"loss": np.asarray([9.0, 3.0], np.float32), "slot": right["slot"]}
  masks = {"class": np.asarray([False, False]), "scene": np.asarray([False, True])}
  measure = make_prompt_sensitivity(
    None, make_mesh(setup.config.mesh, 2), right, {k: (wrong, mask) for k, mask in masks.items()})
  assert measure({}, {}) == {"gap/scene": 0.5}  # 3 / 2 - 1
  assert "gap/class is left out" in caplog.text and "gap/scene" not in caplog.text


# The command line and the config.




def test_packages_and_their_norms(setup, compiled):
  """Together they are the whole adapter's; what a step is asked for lies on the devices."""
  state, metrics = compiled(setup.state(), setup.frozen, next(setup.batches()))
  parts = group_by_module(state.trainable)
  assert sorted(parts) == [
    "mfi_encoder.fusion", "mfi_encoder.heads", "mfi_encoder.textual", "mfi_encoder.visual", "unet"
  ]  # fmt: skip
  assert sum(map(len, parts.values())) == len(state.trainable)
  for kind in ("gradient", "update"):
    squares = sum(float(metrics[f"norm/{kind}/{part}"]) ** 2 for part in parts)
    np.testing.assert_allclose(squares**0.5, metrics[f"norm/{kind}"], rtol=1e-5)


@pytest.mark.parametrize("text", ["5", "7:5", "a:b"])
def test_profile_steps(text):
  assert train_command.parse_steps("10:15") == (10, 15) and train_command.parse_steps("") == (0, 0)
  with pytest.raises(UserError, match="give the first and last step"):
    train_command.parse_steps(text)


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
  """Each in a process of its own, all at once: flags are global."""
  cases = {
    "--config.train.stepz=3": "no key stepz",
    "--bogus=3": "bogus",
    "--config.train.steps=many": "steps",
    "--config=configs/nowhere.py": "nowhere.py",
    "--config.base=nowhere": "base 'nowhere' is no folder",
    "train.steps=3": "unexpected argument",
    "--workdir=": "no --workdir",
  }
  processes = {
    flag: subprocess.Popen(
      [sys.executable, "-m", "cc_jax.train", f"--workdir={tmp_path}", flag],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for flag in cases
  }
  for flag, process in processes.items():
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, (flag, err)
    assert cases[flag] in err and err.startswith("error: ") and err.count("\n") == 1, (flag, err)


@pytest.mark.parametrize(
  ("name", "unet", "text", "trained"),
  [  # frozen counts as published
    ("sd15", "859,520,964", "123,060,480", 120e6),
    ("sd21", "865,910,724", "340,387,840", 150e6),
    ("sdxl", "2,567,463,684", "817,720,320", 410e6),
  ],
)
def test_the_tables_of_stable_diffusion_need_no_weights(name, unet, text, trained):
  config = importlib.import_module(f"configs.{name}").get_config()
  rows = {tuple(line.split()[:2]): line.split()[2:] for line in parameter_table(config).split("\n")}
  assert rows["unet", "frozen"][1] == unet and rows["text_encoders", "frozen"][1] == text
  assert rows["vae", "frozen"][1] == "83,653,863"
  frozen = [int(rows[part, "frozen"][1].replace(",", ""))
            for part in ("unet", "text_encoders", "vae", "image_encoder")]
  total, size = rows["all", "frozen"][1:]
  assert int(total.replace(",", "")) == sum(frozen)
  assert float(size.replace(",", "")) == pytest.approx(2 * sum(frozen) / 2**20, abs=0.1)  # bfloat16
  count = int(rows["all", "trained"][1].replace(",", ""))
  assert 0.7 * trained < count <= trained
  assert int(rows["EMA", "state"][1].replace(",", "")) == count
  # What README says of the download (float32), and of the disk: two checkpoints of weights, EMA
  # and Adam's two averages, and an adapter.
  label = {"sd15": "1.5", "sd21": "2.1", "sdxl": "XL"}[name]
  readme = (Path(__file__).parents[1] / "README.md").read_text()
  row = re.search(rf"^\| Stable Diffusion {label} \|(.*)\|$", readme, re.MULTILINE)[1].split("|")
  assert float(row[0].split()[0]) == round(4 * sum(frozen) / 1e9, 1)
  assert float(row[3].split()[0]) == pytest.approx((2 * 4 + 1) * 4 * count / 1e9, abs=0.06)


def test_bfloat16_computes_in_it_and_keeps_float32_where_it_learns(setup):
  """Shapes and dtypes only: nothing is compiled."""
  config = setup.config.copy_and_resolve_references()
  config.train.update(dtype="bfloat16", base_dtype="bfloat16")
  base = abstract_base(config.base, **base_options(config))
  definition, trainable, frozen = build_customcontrast(
    base, *adapter_configs(config), dtype=config.train.dtype, transform=eval_shape_only
  )
  assert {x.dtype for x in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in trainable.values()} == {jnp.dtype(jnp.float32)}
  context = make_step_context(config, definition, base)
  state = jax.eval_shape(lambda t: step.init_state(t, config), trainable)
  seen = []
  real = CustomContrast.predict

  def predict(model, latents, t, conditioning):
    seen.extend(layer.visual.dtype for layer in conditioning.context)
    return real(model, latents, t, conditioning)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(CustomContrast, "predict", predict)
    after, metrics = jax.eval_shape(
      lambda *args: step.train_step(context, *args, np.uint32(0)),
      state, frozen, next(setup.batches())
    )
  assert set(seen) == {jnp.dtype(jnp.bfloat16)}
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
  assert jax.tree.all(same)
  assert metrics["loss"].dtype == jnp.float32
