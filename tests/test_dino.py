"""DINO's encoders against transformers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from torch_parity import assert_same, assert_same_names, randomise

from cc_jax.bases.base import load_module
from cc_jax.bases.save import save_module
from cc_jax.errors import UserError
from cc_jax.models.dino import Dino, DinoConfig

# An epsilon as large as this shows in the numbers when another one is taken.
SMALL = dict(
  hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=4,
  layer_norm_eps=0.1,
)  # fmt: skip


def vit():
  return transformers.ViTModel(transformers.ViTConfig(**SMALL, intermediate_size=40))


def dinov2():
  return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=3, qkv_bias=False))


@pytest.mark.parametrize(
  "make, shape",
  [
    (vit, (3, 20, 20, 3)),
    (vit, (1, 31, 18, 3)),  # other positions, and pixels left over
    (dinov2, (1, 20, 20, 3)),
    (dinov2, (3, 9, 50, 3)),
  ],
  ids=["vit", "vit_odd_size", "dinov2", "dinov2_odd_size"],
)
def test_parity(make, shape, tmp_path):
  theirs = randomise(make())
  theirs.save_pretrained(tmp_path)
  ours = load_module(tmp_path, Dino)
  pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  interpolate = {"interpolate_pos_encoding": True} if make is vit else {}

  def run_theirs(pixels):
    out = theirs(pixels.permute(0, 3, 1, 2), output_hidden_states=True, **interpolate)
    return [out.last_hidden_state, out.last_hidden_state[:, 0], *out.hidden_states]

  def run_ours(module, pixels):
    last, pooled, states = module(pixels)
    return [last, pooled, *states]

  assert_same(run_ours, ours, [pixels], run_theirs, theirs)


@pytest.mark.parametrize("make", [vit, dinov2])
def test_saved_folder_is_transformers_own(make, tmp_path):
  """PyTorch, given what we saved, has every parameter back but those that DINO does not use."""
  theirs = randomise(make())
  theirs.save_pretrained(tmp_path / "theirs")
  save_module(load_module(tmp_path / "theirs", Dino), tmp_path / "ours")
  again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not report["unexpected_keys"]
  assert all(name.startswith("pooler.") for name in report["missing_keys"])
  state = theirs.state_dict()
  for name, tensor in again.state_dict().items():
    if not name.startswith("pooler."):
      assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
  "cls, config",
  [
    (transformers.ViTModel, dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536)),
    (transformers.Dinov2Model, dict(hidden_size=384, num_attention_heads=6, image_size=518)),
    (transformers.Dinov2Model, dict(image_size=518)),
  ],
  ids=["dino_s16", "dinov2_s", "dinov2_b"],
)
def test_real_sizes(cls, config):
  settings = cls.config_class(**config)
  ours = DinoConfig.from_dict(settings.to_dict() | {"architectures": [cls.__name__]})
  assert_same_names(Dino, ours, lambda: cls(settings))


def test_config(tmp_path):
  """A file's missing fields have the defaults of its own architecture; ours reads what it wrote."""
  assert DinoConfig.from_dict({"model_type": "vit"}) == DinoConfig()
  config = DinoConfig.from_dict({"model_type": "dinov2", "hidden_size": 24, "mlp_ratio": 3})
  assert (config.layer_norm_eps, config.patch_size, config.intermediate_size) == (1e-6, 14, 72)
  assert DinoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
  "values, named",
  [
    (dict(architectures=["Dinov2WithRegistersModel"]), "Dinov2WithRegistersModel"),
    (dict(), "architectures is None"),
    (dict(model_type="dinov2", use_swiglu_ffn=True), "use_swiglu_ffn"),
    (dict(model_type="vit", image_size=[224, 196]), "image_size"),
    (dict(model_type="vit", qkv_bias="no"), "qkv_bias"),
    (dict(model_type="vit", num_attention_heads=7), "num_attention_heads"),
  ],
)
def test_configs_that_are_not_implemented_are_refused_by_name(values, named):
  with pytest.raises(UserError, match=named):
    DinoConfig.from_dict(values)


def test_less_than_a_patch(tmp_path):
  vit().save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="a patch has 4"):
    jax.eval_shape(load_module(tmp_path, Dino), np.zeros((1, 3, 9, 3), np.float32))
