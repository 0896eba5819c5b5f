"""The tiled and the ring implementation against the naive one, on eight virtual devices and on one.

The eight are in a process of their own (run_global_objectives.py).
"""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_global_objectives as eight

from cc_jax.errors import UserError
from cc_jax.objectives.contrast import NAIVE, Contrast, contrast
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.macl import SCALINGS, macl
from cc_jax.objectives.pairs import PairLoss

KINDS = ("tiled", "ring")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  out = tmp_path_factory.mktemp("objectives") / "out.npz"
  script = Path(eight.__file__)
  done = subprocess.run([sys.executable, script, out], capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stderr
  return dict(np.load(out))


def relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("case", (*SCALINGS, "cscl"))
def test_all_implementations_agree(found, case):
  naive = {k.split("/")[-1]: v for k, v in found.items() if k.startswith(f"{case}/naive/")}
  assert set(naive) == {
    "loss", "positive", "negative", "accuracy", "d_z", "d_z_plus", "d_embed"
  }
  assert 0.05 < naive["accuracy"] < 0.95  # a number that says something
  for kind in KINDS:
    for name, expected in naive.items():
      ours = found[f"{case}/{kind}/{name}"]
      if name == "d_embed":  # S is a measurement
        assert not ours.any() and not expected.any()
      else:
        assert relative(ours, expected) < 1e-5, (kind, name)
  if case == "cscl":  # only the arrays it is given
    assert not naive["d_z"][1:].any() and naive["d_z"][0, :, 0].any()


def test_memory_at_the_size_of_a_pod(found):
  """32,768 samples, 16 layers, 768 wide on 8 devices: compiled, not run."""
  rows, n = eight.POD["N"] // eight.DEVICES, eight.POD["N"]
  assert found["largest/naive"] >= rows * n  # so what is looked for can be found
  for kind in KINDS:
    assert found[f"largest/{kind}"] < rows * n
    assert np.prod(found[f"tile/{kind}"]) <= rows * n / 16
    assert found[f"memory/{kind}"] <= found["memory/naive"] / 20
  assert found["memory/ring"] < found["memory/tiled"]


def test_cutting_a_batch_moves_nothing_between_devices(found):
  assert found["cutting/collectives"] == 0


# One device.


@pytest.mark.parametrize("scaling", SCALINGS)
def test_finite_at_temperature_one_thousandth_and_for_zero_vectors(scaling):
  """Of the oracle's values, too, as far as float32 knows logits of 10,000."""
  z, z_plus, embed = (jnp.asarray(a) for a in eight.features())
  z, embed = z.at[:, 1].set(0.0).at[0, 0, 0].set(1e-30), embed.at[2].set(0.0)

  def loss(z, z_plus, kind):
    how = NAIVE if kind == "naive" else Contrast(kind, 12)
    options = dict(temperature=0.001, soft_temperature=0.001, symmetric=True, scaling=scaling)
    return macl(z, z_plus, embed, subject_ids=jnp.asarray(eight.IDS), how=how, **options)

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
  def value(x, y, how):
    return cscl(x[0], y[0], temperature=0.2, how=how)

  for x, y in ((z, z[::-1]), (jnp.ones_like(z), jnp.ones_like(z))):
    loss, metrics = value(x, y, NAIVE)
    for kind in KINDS:
      ours, parts = value(x, y, Contrast(kind, 1000))
      np.testing.assert_allclose(ours, loss, rtol=1e-6)
      for name in metrics:
        np.testing.assert_allclose(parts[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
  assert metrics["accuracy"] == 0
  # The training step must see that a batch is broken.
  for how in (NAIVE, Contrast("tiled", 7)):
    assert np.isnan(value(z.at[0, 3, 0].set(jnp.nan), z, how)[0])


def test_auto_goes_by_memory(capsys):
  plain, both = PairLoss(0.1, "inverse"), PairLoss(0.1, both_ways=True)
  mesh = jax.sharding.AbstractMesh((4, 2, 3), ("data", "fsdp", "tensor"))
  how = Contrast("auto", 1024, mesh, ("data", "fsdp"))
  assert how.devices == 8
  # G * N^2 * 4 bytes of logits over 8 devices against 256 MiB, twice that for both ways
  assert how.choose(plain, 1, 23168, 8, 8) == "naive"
  assert how.choose(plain, 1, 23176, 8, 8) == "tiled"
  assert how.choose(both, 1, 16376, 8, 8) == "naive"
  assert how.choose(both, 1, 16384, 8, 8) == "tiled"
  assert how.choose(plain, 16, 5792, 8, 8) == "naive"
  assert Contrast("auto").choose(plain, 1, 8192, 8, 8) == "tiled"  # the same logits on one device
  # N * (D + E) * 4 bytes of keys against 512 MiB; without S, E does not count
  assert how.choose(plain, 1, 2**17 - 8, 768, 256) == "tiled"
  assert how.choose(plain, 1, 2**17, 768, 256) == "ring"
  assert how.choose(both, 1, 2**17, 768, 256) == "tiled"
  assert Contrast("ring").choose(plain, 1, 4, 8, 8) == "ring"

  x = jnp.ones((1, 6, 2))
  for _ in range(2):
    jax.eval_shape(lambda: contrast(Contrast(), both, x, x, None, None, name="once"))
  said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("once: ")]
  assert len(said) == 1 and "6 samples on 1 devices: naive (auto" in said[0]


def test_errors():
  with pytest.raises(UserError, match="objective.contrast 'fast'; we have auto, naive, tiled"):
    Contrast("fast")
  with pytest.raises(UserError, match="objective.tile is 0"):
    Contrast(tile=0)
  mesh = jax.sharding.AbstractMesh((4,), ("data",))
  x = jnp.ones((1, 6, 2))
  with pytest.raises(UserError, match="6 samples do not divide over 4 devices; change train.batch"):
    contrast(Contrast("ring", 4, mesh, ("data",)), PairLoss(0.1), x, x, None, None, name="x")
