"""Four meshes of virtual devices give the same numbers; what is sharded how; what is refused."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from cc_jax.bases.base import abstract_base
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.errors import UserError
from cc_jax.parallel.distributed import initialize_distributed
from cc_jax.parallel.mesh import AXES, make_mesh, replicated_sharding
from cc_jax.parallel.rules import abstract_params, param_spec
from cc_jax.parallel.sharding_report import (
  check_sharding,
  describe_sharding,
  unexpectedly_replicated,
)
from cc_jax.plan import estimate as cost
from cc_jax.plan.lower import AbstractProgram
from cc_jax.plan.report import state_table
from cc_jax.training import step
from cc_jax.training.setup import adapter_configs, base_options, known_architecture

SCRIPT = Path(__file__).parent / "run_sharded.py"
MESHES = ("1x1x1", "8x1x1", "1x8x1", "2x2x2")


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
  folder = tmp_path_factory.mktemp("sharded")
  done = subprocess.run(
    [sys.executable, SCRIPT, tiny_folder, folder], capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 0, done.stderr
  return {name: np.load(folder / f"{name}.npz") for name in MESHES}, folder, done.stdout


def relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_numbers_do_not_depend_on_the_mesh(runs, mesh):
  """Losses of five steps, the first step's gradients, parameters and EMA after the fifth."""
  one, other = runs[0]["1x1x1"], runs[0][mesh]
  assert set(one) == set(other)
  assert one["parameter/mfi_encoder.visual.queries"].dtype == np.float64
  scale = float(one["metric/0/norm/gradient"])
  gradients = [key for key in one if key.startswith("gradient/")]
  zero = [key for key in gradients if np.linalg.norm(one[key]) < 1e-12 * scale]
  assert zero == [], "gradients that are truly zero must be listed here"
  wrong = {}
  for key in one:
    if key.startswith("metric/"):
      np.testing.assert_allclose(other[key], one[key], rtol=1e-5, atol=1e-12, err_msg=key)
    else:
      wrong[key] = relative(other[key], one[key])
  assert len(wrong) > 200
  assert max(wrong.values()) < 1e-5, sorted(wrong.items(), key=lambda kv: -kv[1])[:3]


def test_a_checkpoint_is_restored_onto_other_meshes_bit_for_bit(runs):
  lines = [line.split()[1:] for line in runs[2].splitlines() if line.startswith("restored")]
  assert [line[:4] for line in lines] == [["2", "2", "2", "True"], ["1", "1", "1", "True"]]
  assert int(lines[0][4]) > 100 and int(lines[1][4]) == 0  # it really was sharded


LAYERS, SAMPLES, QUERIES, WIDTH = 4, 16, 2, 8


def gathered(hlo):
  shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", hlo)
  assert shapes
  return {tuple(int(n) for n in shape.split(",")) for shape in shapes}


def test_only_small_things_are_gathered(runs):
  """The batch stays sharded: nothing that is gathered is larger than the contrastive tokens.

  A reshape that folds layers into the batch would gather every layer's text, forward and backward.
  """
  shapes = gathered((runs[1] / "8x1x1.hlo").read_text())
  assert max(map(math.prod, shapes)) <= LAYERS * SAMPLES * QUERIES * WIDTH


def test_over_fsdp_weights_are_gathered_and_not_what_goes_through_them(runs):
  """Without all_gather_on_use the partitioner shards channels as a weight is sharded."""
  known = {tuple(shape) for shape in json.loads((runs[1] / "shapes.json").read_text())}
  known |= {shape[::-1] for shape in known if len(shape) == 2}  # transposed for a product
  tokens = {(LAYERS, SAMPLES, WIDTH), (SAMPLES, WIDTH)}  # pooled, for metrics and losses
  shapes = gathered((runs[1] / "1x8x1.hlo").read_text())
  assert known & shapes and not shapes - known - tokens, shapes - known - tokens
  moved = re.findall(r" (all-to-all|collective-permute)\(.*", (runs[1] / "1x8x1.hlo").read_text())
  assert set(moved) <= {"collective-permute"}  # the ring's


# Placement, without devices.


def mesh_of(data, fsdp, tensor):
  return AbstractMesh((data, fsdp, tensor), AXES)


@pytest.mark.parametrize(
  ("path", "shape", "expected"),
  [
    ("unet.a.ff.net.0.proj.kernel", (640, 5120), ("fsdp", "tensor")),
    ("unet.a.ff.net.2.kernel", (2560, 640), ("tensor", "fsdp")),
    ("unet.a.attn1.to_q.kernel", (640, 640), ("fsdp", "tensor")),
    ("opt_state/0/mu/unet.a.attn1.to_out.0.kernel", (640, 640), ("tensor", "fsdp")),
    ("unet.a.conv1.kernel", (3, 3, 320, 640), (None, None, "fsdp", "tensor")),
    ("unet.a.conv2.kernel", (3, 3, 640, 640), (None, None, "tensor", "fsdp")),
    ("unet.a.conv_shortcut.kernel", (1, 1, 960, 640), (None, None, "fsdp")),  # the largest
    ("unet.a.conv_shortcut.kernel", (1, 1, 962, 640), (None, None, None, "fsdp")),  # divides by 4
    ("unet.a.proj_in.kernel", (641, 643), ()),
    ("unet.a.norm.scale", (1280,), ()),  # too small
    ("unet.a.attn1.to_q.kernel", (641, 643), ()),
  ],
)
def test_rules(path, shape, expected):
  spec = tuple(param_spec(path, shape, mesh_of(2, 4, 2)))
  assert spec[: len(expected)] == expected and not any(spec[len(expected) :])
  assert param_spec(path, shape, mesh_of(16, 1, 1)) == jax.P()


@pytest.fixture(scope="module")
def sdxl():
  """The abstract training state and frozen base of configs/sdxl.py."""
  config = importlib.import_module("configs.sdxl").get_config()
  config.base, config.encoder.image_encoder = map(
    known_architecture, (config.base, config.encoder.image_encoder)
  )
  base = abstract_base(config.base, **base_options(config))
  _, trainable, frozen = build_customcontrast(
    base, *adapter_configs(config), dtype=config.train.dtype, transform=eval_shape_only
  )
  return {"state": jax.eval_shape(lambda t: step.init_state(t, config), trainable), "base": frozen}


def test_sdxl_over_four_chips(sdxl):
  """The adapter's state in at most 20 GB, 6 GB a chip; nothing is replicated by mistake."""
  mesh = mesh_of(1, 4, 1)
  tree = abstract_params(sdxl, mesh)
  check_sharding(tree, mesh)
  state, base = tree["state"], tree["base"]
  parts = {"frozen base": base, "adapter": state.trainable, "Adam": state.opt_state}
  parts |= {"EMA": state.ema, "gradients": state.trainable}
  total, chip = (sum(map(size, parts.values())) for size in (cost.all_bytes, cost.chip_bytes))
  assert 15e9 < total < 20e9
  assert total / 4 < chip < min(6e9, 1.02 * total / 4)
  for name, part in parts.items():
    total_bytes, replicated = unexpectedly_replicated(part, mesh)
    # Of all bytes, those of parameters that are too small for the rules included.
    assert total_bytes > 0.98 * cost.all_bytes(part), name
    assert sum(replicated.values()) < 0.02 * total_bytes, name
  del parts["gradients"]  # the plan adds them
  assert f"{total / 1e9:.4g}" in state_table(AbstractProgram(None, None, (), parts, 0))
  table = describe_sharding({"frozen": base, "trained": state.trainable}, mesh)
  row = next(line.split() for line in table.splitlines() if re.match("frozen +unet +fsdp", line))
  assert float(row[-2].replace(",", "")) == pytest.approx(4 * float(row[-1].replace(",", "")), 1e-3)


def test_what_does_not_divide_or_is_replicated_is_refused_by_name(sdxl):
  mesh = mesh_of(1, 7, 1)
  message = r"100% of the bytes .* \(mesh.fsdp=7, mesh.tensor=1\): \S+embedding, .* choose sizes"
  with pytest.raises(UserError, match=message):
    check_sharding(abstract_params(sdxl, mesh), mesh)
  mesh = mesh_of(1, 4, 1)
  tree = abstract_params(sdxl, mesh)
  replicated = {
    key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated_sharding(mesh))
    for key, x in tree["base"].items()
    if key.startswith("text_encoders.")
  }
  message = r"20% of the bytes .*: text_encoders.1.text_model.embeddings.token_embedding.embedding"
  with pytest.raises(UserError, match=message):
    check_sharding({**tree["base"], **replicated}, mesh)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (dict(data=-1, fsdp=-1), "only one axis can take what the others leave"),
    (dict(data=0), "mesh.data is 0"),
    (dict(data=-1, tensor=64), "mesh.tensor=64, but there are"),
    (dict(data=1, processes=0), "mesh.processes is 0"),
  ],
)
def test_meshes_that_make_no_sense(sizes, message):
  mesh = ml_collections.ConfigDict(sizes)
  with pytest.raises(UserError, match=message):
    initialize_distributed(mesh)
    make_mesh(mesh, 4)


def test_a_batch_of_the_right_size_for_data_and_fsdp():
  devices = np.asarray([jax.devices()[0]] * 8, object)  # never used: the error comes first
  mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=2, tensor=2))
  with pytest.raises(UserError, match="batch_size=6 does not divide over 4 devices"):
    make_mesh(mesh, 6, devices)
