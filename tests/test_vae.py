"""AutoencoderKL against diffusers."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
from flax import nnx
from torch_parity import (
  abstract,
  assert_same,
  assert_same_names,
  randomise,
  relative_error,
  to_nchw,
)

from cc_jax.bases.base import load_base, load_module
from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.sampling.pipeline import Pipeline

MINI = dict(
  block_out_channels=[16, 32, 32],
  down_block_types=["DownEncoderBlock2D"] * 3,
  up_block_types=["UpDecoderBlock2D"] * 3,
  latent_channels=8,
  norm_num_groups=8,
  layers_per_block=1,
)
SD = dict(
  block_out_channels=[8, 16, 16, 24],
  down_block_types=["DownEncoderBlock2D"] * 4,
  up_block_types=["UpDecoderBlock2D"] * 4,
  latent_channels=4,
  norm_num_groups=4,
  layers_per_block=1,
)
BARE = dict(
  block_out_channels=[8, 16],
  down_block_types=["DownEncoderBlock2D"] * 2,
  up_block_types=["UpDecoderBlock2D"] * 2,
  norm_num_groups=4,
  layers_per_block=2,
  mid_block_add_attention=False,
  use_quant_conv=False,
  use_post_quant_conv=False,
)
SD15_VAE = dict(
  block_out_channels=[128, 256, 512, 512],
  down_block_types=["DownEncoderBlock2D"] * 4,
  up_block_types=["UpDecoderBlock2D"] * 4,
  latent_channels=4,
  layers_per_block=2,
  sample_size=512,
)


@pytest.mark.parametrize(
  "settings, image, latents",
  [
    (MINI, (2, 16, 16, 3), (2, 4, 4, 8)),
    # An odd size: the strided convolutions pad one side only.
    (SD, (1, 37, 50, 3), (1, 41, 65, 4)),
    (BARE, (3, 8, 6, 3), (3, 40, 72, 4)),
  ],
  ids=["mini", "sd_odd", "bare"],
)
def test_parity(settings, image, latents, tmp_path):
  theirs = randomise(diffusers.AutoencoderKL(**settings))
  theirs.save_pretrained(tmp_path)
  ours = load_weights(abstract(AutoencoderKL, AutoencoderKLConfig.from_dict(settings)), tmp_path)
  rng = np.random.default_rng(0)
  x, z = (rng.standard_normal(shape).astype(np.float32) for shape in (image, latents))

  def run_ours(module, x, z):
    return [*module.encode(x), module.decode(z)]

  def run_theirs(x, z):
    posterior = theirs.encode(x.permute(0, 3, 1, 2)).latent_dist
    outs = [posterior.mean, posterior.logvar, theirs.decode(z.permute(0, 3, 1, 2)).sample]
    return [out.permute(0, 2, 3, 1) for out in outs]

  assert_same(run_ours, ours, [x, z], run_theirs, theirs)


def test_real_size():
  assert_same_names(
    AutoencoderKL,
    AutoencoderKLConfig.from_dict(SD15_VAE),
    lambda: diffusers.AutoencoderKL(**SD15_VAE),
  )


def test_old_attention_names(tmp_path):
  theirs = randomise(diffusers.AutoencoderKL(**BARE | {"mid_block_add_attention": True}))
  state = theirs.state_dict()
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  renamed = {}
  for name, tensor in state.items():
    for new_name, old_name in old.items():
      name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
    renamed[name] = tensor.contiguous()
  assert sum("proj_attn" in name for name in renamed) == 4
  safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
  config = AutoencoderKLConfig.from_dict(BARE | {"mid_block_add_attention": True})
  ours = load_weights(abstract(AutoencoderKL, config), tmp_path)
  for new_name in ("to_q", "to_k", "to_v"):
    kernel = getattr(ours.decoder.mid_block.attentions[0], new_name).kernel[...]
    wanted = state[f"decoder.mid_block.attentions.0.{new_name}.weight"].numpy().T
    assert np.array_equal(kernel, wanted)


def test_bfloat16_compute_keeps_parameters():
  config = AutoencoderKLConfig.from_dict(BARE)

  def run():
    module = AutoencoderKL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    mean, logvar = module.encode(jnp.ones((1, 8, 8, 3)))
    return nnx.state(module), (mean, logvar, module.decode(mean))

  params, outs = jax.eval_shape(run)
  assert {out.dtype for out in outs} == {jnp.bfloat16.dtype}
  assert {leaf.dtype for _, leaf in nnx.to_flat_state(params)} == {jnp.float32.dtype}


def change_config(folder, **changes):
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_float16_overflows_where_the_config_does_not_ask_for_float32(tmp_path):
  theirs = randomise(diffusers.AutoencoderKL(**BARE))
  theirs.decoder.conv_in.weight.data *= 3e3
  theirs.save_pretrained(tmp_path)
  z = 30 * np.random.default_rng(0).standard_normal((1, 3, 2, 4)).astype(np.float32)
  wanted = theirs.decode(to_nchw(z)).sample.detach().permute(0, 2, 3, 1)

  def decode():
    vae = load_module(tmp_path, AutoencoderKL, dtype=jnp.float16, param_dtype=jnp.float16)
    assert vae.decoder.conv_in.kernel.dtype == jnp.float16
    return np.asarray(jax.jit(vae.decode)(z))

  change_config(tmp_path, force_upcast=True)
  assert relative_error(decode(), wanted) < 1e-2
  change_config(tmp_path, force_upcast=False)
  assert not np.isfinite(decode()).all()


def test_a_picture_that_is_not_finite_is_a_mistake_with_a_remedy(tiny_folder, tmp_path):
  """The VAE alone is in float16, whose attention XLA's CPU backend does not have."""
  folder = shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
  change_config(folder, scaling_factor=1e-7, force_upcast=False)
  base = load_base(tiny_folder)
  base.vae = load_module(folder, AutoencoderKL, dtype=jnp.float16)
  with pytest.raises(UserError, match="not finite; draw in float32"):
    Pipeline(base)("a duck on the beach", steps=1, guidance=1.0)


@pytest.mark.parametrize(
  "key, value",
  [
    ("act_fn", "relu"),
    ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    ("latents_mean", [0.0] * 4),
    ("norm_num_groups", 3),
    ("temporal_compression", 4),
  ],
)
def test_unknown_config_value(key, value):
  with pytest.raises(UserError, match=key):
    AutoencoderKLConfig.from_dict(BARE | {key: value})


def test_config_of_diffusers():
  """What diffusers writes, every key of it, gives the same fields as what it was made from."""
  theirs = diffusers.AutoencoderKL(**MINI, scaling_factor=0.7)
  config = AutoencoderKLConfig.from_dict(dict(theirs.config))
  wanted = AutoencoderKLConfig.from_dict(MINI | {"scaling_factor": 0.7})
  assert dataclasses.asdict(config) == dataclasses.asdict(wanted)
  assert config.factor == 4
