"""Eight virtual devices give the numbers of one; each count in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "run_sharded.py"


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
  folder = tmp_path_factory.mktemp("sharded")
  processes = {
    devices: subprocess.Popen(
      [sys.executable, SCRIPT, str(devices), tiny_folder, folder / f"{devices}.npz"],
      stderr=subprocess.PIPE,
      text=True,
    )
    for devices in (1, 8)
  }
  for process in processes.values():
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
  return {
    devices: (np.load(folder / f"{devices}.npz"), (folder / f"{devices}.npz.hlo").read_text())
    for devices in (1, 8)
  }


def relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_loss_gradients_and_average_do_not_depend_on_the_devices(runs):
  one, eight = runs[1][0], runs[8][0]
  assert set(one) == set(eight)
  for key in ("loss", "loss/diffusion", "loss/cscl", "loss/macl", "norm/gradient"):
    np.testing.assert_allclose(eight[f"metric/{key}"], one[f"metric/{key}"], rtol=1e-5)
  gradients = [key for key in one if key.startswith("gradient/")]
  scale = float(one["metric/norm/gradient"])
  zero = [key for key in gradients if np.linalg.norm(one[key]) < 1e-7 * scale]
  assert zero == [], "gradients that are truly zero must be listed here"
  wrong = {key: relative(eight[key], one[key]) for key in gradients}
  assert max(wrong.values()) < 1e-5, sorted(wrong.items(), key=lambda kv: -kv[1])[:3]
  for key in one:
    if key.startswith("ema/"):
      assert relative(eight[key], one[key]) < 1e-5, key


def test_only_small_things_are_gathered(runs):
  """The batch stays cut: of what is gathered, nothing is larger than the contrastive tokens.

  A reshape that folds layers into the batch would gather every layer's text, forward and backward.
  """
  hlo = runs[8][1]
  gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", hlo)
  sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in gathered]
  assert sizes, "CSCL and MACL gather their keys"
  layers, samples, queries, width = 4, 16, 2, 8
  assert max(sizes) <= layers * samples * queries * width
