"""DINO's encoders against transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from torch_parity import assert_same, assert_same_names, randomise, relative_error

import data_pipeline
from cc_jax import generate
from cc_jax.bases.base import load_base, load_module
from cc_jax.bases.save import save_base, save_module
from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import clip_pixels
from cc_jax.models.dino import Dino, DinoConfig
from cc_jax.training.loop import train

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


# As published beside DINOv2's weights, at a sixteenth of the size; 9 x 9 positions for 36 px.
PROCESSOR = dict(
  crop_size=dict(height=16, width=16), do_center_crop=True, do_convert_rgb=True, do_normalize=True,
  do_rescale=True, do_resize=True, image_mean=[0.485, 0.456, 0.406], resample=3,
  image_processor_type="BitImageProcessor", image_std=[0.229, 0.224, 0.225],
  rescale_factor=1 / 255, size=dict(shortest_edge=18),
)  # fmt: skip


@pytest.fixture
def published(tmp_path):
  """(folder, transformers' model) of a mini DINOv2 in the layout of facebook/dinov2-small."""
  config = transformers.Dinov2Config(**SMALL | dict(image_size=36, layer_norm_eps=1e-6))
  theirs, folder = randomise(transformers.Dinov2Model(config)), tmp_path / "dinov2"
  theirs.save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
  return folder, theirs


def test_as_the_image_encoder_of_a_base(published, tiny_folder, tmp_path):
  """The features are transformers', preprocessing included where nothing is resized."""
  folder, theirs = published
  base = load_base(tiny_folder, image_encoder=folder)
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
  processor = transformers.BitImageProcessor(**PROCESSOR | dict(size=dict(shortest_edge=16)))
  wanted = processor(list(images), return_tensors="pt")["pixel_values"]
  pixels = clip_pixels(jnp.asarray(images, jnp.float32) / 255, base.image_processor, square=True)
  assert relative_error(pixels.transpose(0, 3, 1, 2), wanted) < 1e-6
  with jax.default_matmul_precision("highest"):
    out = jax.jit(lambda pixels: base.image_encoder(pixels))(pixels)
  with torch.no_grad():
    wanted = theirs(wanted, output_hidden_states=True)
  assert len(out.hidden_states) == base.image_encoder.num_hidden_states == 3
  for ours, state in zip(out.hidden_states, wanted.hidden_states, strict=True):
    assert ours.shape[1:] == (base.image_encoder.num_tokens(16), base.image_encoder.width)
    assert relative_error(ours, state) < 1e-5
  assert relative_error(out.embedding, wanted.pooler_output) < 1e-5

  save_base(base, tmp_path / "saved")  # and back, as a part of the base
  again = load_base(tmp_path / "saved")
  assert again.hash == base.hash and again.image_processor == base.image_processor


@pytest.mark.slow
def test_an_adapter_trains_on_it_and_draws(published, tiny_folder, tmp_path, monkeypatch):
  monkeypatch.setattr(
    data_pipeline, "make_loader",
    lambda _, tokenizer, *, batch_size, seed, start_step=0, **__: tiny.batches(
      tokenizer, batch_size, seed=seed, start=start_step),
  )  # fmt: skip
  config = tiny.tiny_config(tiny_folder, train__steps=2, encoder__image_encoder=str(published[0]))
  train(config, tmp_path / "run")
  pipeline = generate.load(tmp_path / "run", tiny_folder)
  assert isinstance(pipeline.base.image_encoder, Dino)
  photo = np.full((16, 16, 3), 200, np.uint8)
  images = pipeline("a duck on the beach", "duck", [photo], steps=2)
  assert np.asarray(images[0]).shape == (16, 16, 3)


def test_folders_that_are_no_image_encoder(published, tiny_folder):
  folder, _ = published
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | dict(architectures=["SwinModel"])))
  with pytest.raises(UserError, match=r"config.json: image_encoder is a SwinModel; we have .*Dino"):
    load_base(tiny_folder, image_encoder=folder)


def test_a_config_without_architectures_goes_by_its_model_type(published, tiny_folder):
  folder, _ = published
  config = json.loads((folder / "config.json").read_text())
  kind = config.pop("architectures")[0]
  (folder / "config.json").write_text(json.dumps(config))
  assert load_base(tiny_folder, image_encoder=folder).image_encoder.config.architecture == kind


def test_preprocessing_of_the_first_dino(published, tiny_folder):
  """facebook/dino-vits16 has a plain size, no crop, and PIL's bilinear filter."""
  folder, _ = published
  values = dict(do_normalize=True, do_resize=True, resample=2, size=24)
  (folder / "preprocessor_config.json").write_text(json.dumps(values))
  processor = load_base(tiny_folder, image_encoder=folder).image_processor
  assert (processor["size"], processor["shortest_edge"], processor["method"]) == (24, 24, "linear")
  assert processor["mean"] == (0.485, 0.456, 0.406)
