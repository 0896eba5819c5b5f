"""The tiled and the ring backend against the naive one, on eight virtual devices and on one.

The eight are in a process of their own (run_global_objectives.py).
"""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_global_objectives as eight
import tiny

from cc_jax.errors import UserError
from cc_jax.objectives.contrast import NAIVE_BACKEND, ContrastiveBackend, contrast
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.macl import POOLINGS, SCALINGS, macl
from cc_jax.objectives.pair_scaling import PairLoss
from cc_jax.training.contrastive import compare_embeddings, contrastive_embeddings
from cc_jax.training.encodings import SubjectEncodings
from cc_jax.training.setup import build_abstract, make_step_context

KINDS = ("tiled", "ring")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  out = tmp_path_factory.mktemp("objectives") / "out.npz"
  script = Path(eight.__file__)
  done = subprocess.run([sys.executable, script, out], capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stderr
  return dict(np.load(out))


def relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("case", (*SCALINGS, "cscl"))
def test_all_backends_agree(results, case):
  naive = {k.split("/")[-1]: v for k, v in results.items() if k.startswith(f"{case}/naive/")}
  assert set(naive) == {
    "loss", "positive", "negative", "accuracy", "d_z", "d_z_plus", "d_embed"
  }
  assert 0.05 < naive["accuracy"] < 0.95  # a number that says something
  for kind in KINDS:
    for name, expected in naive.items():
      ours = results[f"{case}/{kind}/{name}"]
      if name == "d_embed":  # S is a measurement
        assert not ours.any() and not expected.any()
      else:
        assert relative(ours, expected) < 1e-5, (kind, name)
  if case == "cscl":  # only the arrays it is given
    assert not naive["d_z"][1:].any() and naive["d_z"][0, :, 0].any()


def test_memory_at_the_size_of_a_pod(results):
  """32,768 samples, 16 layers, 768 wide on 8 devices: compiled, not run."""
  rows, n = eight.POD["N"] // eight.DEVICES, eight.POD["N"]
  assert results["largest/naive"] >= rows * n  # so the search below can find it
  for kind in KINDS:
    assert results[f"largest/{kind}"] < rows * n
    assert np.prod(results[f"tile/{kind}"]) <= rows * n / 16
    assert results[f"memory/{kind}"] <= results["memory/naive"] / 20
  assert results["memory/ring"] < results["memory/tiled"]


def test_cutting_a_batch_moves_nothing_between_devices(results):
  assert results["cutting/collectives"] == 0


# One device.


@pytest.mark.parametrize("scaling", SCALINGS)
def test_finite_at_temperature_one_thousandth_and_for_zero_vectors(scaling):
  """Of the oracle's values, too, as far as float32 knows logits of 10,000."""
  z, z_plus, embed = (jnp.asarray(a) for a in eight.features())
  z, embed = z.at[:, 1].set(0.0).at[0, 0, 0].set(1e-30), embed.at[2].set(0.0)

  def loss(z, z_plus, kind):
    backend = NAIVE_BACKEND if kind == "naive" else ContrastiveBackend(kind, 12)
    options = dict(temperature=0.001, soft_temperature=0.001, symmetric=True, scaling=scaling)
    return macl(z, z_plus, embed, subject_ids=jnp.asarray(eight.IDS), backend=backend, **options)

  gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
  naive, ours = jax.jit(lambda *a: [gradient(*a, kind) for kind in ("naive", "tiled")])(z, z_plus)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))
  np.testing.assert_array_equal(ours[1][0][:, 1], 0.0)  # a zero vector has no direction
  assert relative(ours[0][0], naive[0][0]) < 1e-4
  for a, b in zip(ours[1], naive[1]):
    assert relative(a, b) < 1e-2 and np.linalg.norm(b) > 1


def test_one_device_alone_one_tile_and_collapse():
  """A tile wider than the batch, no subjects; all features equal: a tie is no hit."""
  z = jnp.asarray(eight.features()[0])[:, :, 0]

  @functools.partial(jax.jit, static_argnums=2)
  def value(x, y, backend):
    return cscl(x[0], y[0], temperature=0.2, backend=backend)

  for x, y in ((z, z[::-1]), (jnp.ones_like(z), jnp.ones_like(z))):
    loss, metrics = value(x, y, NAIVE_BACKEND)
    for kind in KINDS:
      ours, parts = value(x, y, ContrastiveBackend(kind, 1000))
      np.testing.assert_allclose(ours, loss, rtol=1e-6)
      for name in metrics:
        np.testing.assert_allclose(parts[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
  assert metrics["accuracy"] == 0
  # The training step must see that a batch is broken.
  for backend in (NAIVE_BACKEND, ContrastiveBackend("tiled", 7)):
    assert np.isnan(value(z.at[0, 3, 0].set(jnp.nan), z, backend)[0])


def test_auto_goes_by_memory():
  plain, both = PairLoss(0.1, "inverse"), PairLoss(0.1, symmetric=True)
  mesh = jax.sharding.AbstractMesh((4, 2, 3), ("data", "fsdp", "tensor"))
  backend = ContrastiveBackend("auto", 1024, mesh, ("data", "fsdp"))
  assert backend.devices == 8
  # G * N^2 * 4 bytes of logits over 8 devices against 256 MiB, twice that for both ways
  assert backend.choose(plain, 1, 23168, 8, 8) == "naive"
  assert backend.choose(plain, 1, 23176, 8, 8) == "tiled"
  assert backend.choose(both, 1, 16376, 8, 8) == "naive"
  assert backend.choose(both, 1, 16384, 8, 8) == "tiled"
  assert backend.choose(plain, 16, 5792, 8, 8) == "naive"
  assert ContrastiveBackend().choose(plain, 1, 8192, 8, 8) == "tiled"  # the logits of one device
  # N * (D + E) * 4 bytes of keys against 512 MiB; without S, E does not count
  assert backend.choose(plain, 1, 2**17 - 8, 768, 256) == "tiled"
  assert backend.choose(plain, 1, 2**17, 768, 256) == "ring"
  assert backend.choose(both, 1, 2**17, 768, 256) == "tiled"
  assert ContrastiveBackend("ring").choose(plain, 1, 4, 8, 8) == "ring"

  line = ContrastiveBackend().explain(both, 1, 6, 2, 0)
  assert "6 samples on 1 devices: naive (auto; logits" in line
  line = ContrastiveBackend("tiled", 4, mesh, ("data",)).explain(plain, 1, 8192, 64, 64)
  assert line.endswith(
    "8192 samples on 4 devices: tiled, 4 columns at a time (tiled; logits of the naive loss "
    "64.0 MiB a device, a group's gathered keys 4.0 MiB)"
  )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_log_says_what_the_step_computes(tiny_folder, monkeypatch, pooling):
  """StepContext.describe_contrast knows the sizes without tracing the step."""
  calls = []

  def choose(backend, pair_loss, *sizes):
    calls.append((backend, pair_loss.symmetric, pair_loss.needs_similarity, *sizes))
    return "naive"

  config = tiny.tiny_config(
    tiny_folder, objective__macl_pooling=pooling, encoder__contrast_head=6 * (pooling == "mean")
  )
  config, base, (definition, trainable, frozen) = build_abstract(config)
  context = make_step_context(config, definition, base)
  mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
  monkeypatch.setattr(ContrastiveBackend, "choose", choose)
  lines = context.describe_contrast(mesh, trainable, frozen)
  assert [line.split(":")[0] for line in lines] == ["cscl", "macl"]

  def contrastive(trainable, frozen):
    model, n = context.model(trainable, frozen), config.train.batch_size
    pixels, t = jnp.zeros((n, tiny.IMAGE, tiny.IMAGE, 3)), jnp.zeros(n, jnp.int32)
    backend = dataclasses.replace(context, mesh=mesh).contrast
    features, embed = model.image_features(pixels)
    encoded = model.encode(features, t)
    subjects = SubjectEncodings(encoded, encoded, encoded, embed)
    embeddings = contrastive_embeddings(config.objective, subjects)
    return compare_embeddings(config.objective, embeddings, t, backend)

  jax.eval_shape(contrastive, trainable, frozen)
  assert len(calls) == 4 and calls[:2] == calls[2:]


def test_errors():
  with pytest.raises(UserError, match="objective.contrast 'fast'; we have auto, naive, tiled"):
    ContrastiveBackend("fast")
  with pytest.raises(UserError, match="objective.tile is 0"):
    ContrastiveBackend(tile=0)
  mesh = jax.sharding.AbstractMesh((4,), ("data",))
  x = jnp.ones((1, 6, 2))
  with pytest.raises(UserError, match="6 samples do not divide over 4 devices; change train.batch"):
    contrast(ContrastiveBackend("ring", 4, mesh, ("data",)), PairLoss(0.1), x, x, None, None)
