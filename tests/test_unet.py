"""The UNet against diffusers' PyTorch original: values, every gradient, and real sizes' names."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import nnx
from torch_parity import TOLERANCE, assert_same, randomise, relative_error

from cc_jax.bases.base import load_module
from cc_jax.bases.torch_names import from_torch, torch_name, torch_shapes
from cc_jax.errors import UserError
from cc_jax.models.attention import Attention
from cc_jax.models.layers import GroupNorm, LayerNorm
from cc_jax.models.rngs import abstract
from cc_jax.models.unet import UNet2DCondition, UNetConfig, cross_attention_layers

torch.set_num_threads(2)

# Small networks of each family. Groups hold more than one channel, widths differ wherever two could
# be confused, and the blocks with and without attention lie as in the real ones.
SD15 = dict(
  block_out_channels=[8, 16, 24],
  down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
  layers_per_block=1,
  norm_num_groups=4,
  cross_attention_dim=20,
  attention_head_dim=2,
  act_fn="silu",
)
SD2 = dict(
  block_out_channels=[16, 32],
  down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
  up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
  layers_per_block=1,
  norm_num_groups=4,
  cross_attention_dim=20,
  attention_head_dim=[1, 4],
  use_linear_projection=True,
  upcast_attention=True,
)
SDXL = dict(
  block_out_channels=[8, 12, 16],
  down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  layers_per_block=1,
  norm_num_groups=4,
  cross_attention_dim=24,
  transformer_layers_per_block=[1, 1, 2],
  attention_head_dim=[1, 2, 4],
  use_linear_projection=True,
  addition_embed_type="text_time",
  addition_time_embed_dim=6,
  projection_class_embeddings_input_dim=10 + 6 * 6,
)
MINI = dict(
  in_channels=8,
  out_channels=8,
  block_out_channels=[16, 32],
  down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
  up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=32,
  attention_head_dim=[4, 8],
  addition_embed_type="text",
  addition_embed_type_num_heads=4,
  flip_sin_to_cos=False,
  freq_shift=1,
)


class Spy(Attention):
  """Stands where the injection will stand: unpacks its own kind of context, notes what it got."""

  def __init__(self, inner):
    self.heads = inner.heads
    self.to_q, self.to_k, self.to_v, self.to_out = inner.to_q, inner.to_k, inner.to_v, inner.to_out

  def __call__(self, hidden, context, temb=None, hw=None):
    context["seen"].append((context["layer"], hw, temb))
    return super().__call__(hidden, context["text"])


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
  """Halves the compilation, which is most of this file's time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def pair(config, folder):
  """PyTorch's network, and ours from the folder that it saved."""
  torch.manual_seed(0)
  original = randomise(UNet2DConditionModel(**config))
  original.save_pretrained(folder)
  unet = load_module(folder, UNet2DCondition)
  assert epsilons(unet) == torch_epsilons(original)
  return original, unet


def epsilons(unet):
  """The epsilon of every norm: a wrong one changes these networks' values by 1e-5 only."""
  return {
    ".".join(map(str, path)): module.epsilon
    for path, module in nnx.iter_modules(unet)
    if hasattr(module, "epsilon")
  }


def torch_epsilons(unet):
  return {name: module.eps for name, module in unet.named_modules() if hasattr(module, "eps")}


def abstract_unet(config, **dtypes):
  config = UNetConfig.from_dict(config)
  return abstract(lambda rngs: UNet2DCondition(config, **dtypes, rngs=rngs))


def latents_and_text(config, *, batch, height, width):
  rng = np.random.default_rng(0)
  latents = rng.normal(size=(batch, height, width, config.get("in_channels", 4)))
  text = rng.normal(size=(batch, 7, config["cross_attention_dim"]))
  return [latents.astype(np.float32), text.astype(np.float32)]


def nchw(tensor):
  return tensor.permute(0, 3, 1, 2)


def nhwc(tensor):
  return tensor.permute(0, 2, 3, 1)


KINDS = {"sd15": SD15, "sd2": SD2, "sdxl": SDXL}
# 41 x 65 is halved to 21 x 33 and 11 x 17, both of which must be found again on the way up.
SIZES = {"odd": (41, 65), "even": (40, 72)}
QUICK = (("sd15", 1, "odd"), ("sdxl", 3, "odd"))  # SD 2's linear projections are SDXL's


@pytest.mark.parametrize(
  "kind, batch, size",
  [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(KINDS, (1, 3), SIZES)
  ],
)
def test_kinds(kind, batch, size, tmp_path):
  """Of SD 1.5 each layer has a context of its own."""
  original, unet = pair(KINDS[kind], tmp_path)
  timesteps = np.array([421, 3, 999])[:batch]
  rng = np.random.default_rng(1)
  height, width = SIZES[size]
  inputs = latents_and_text(KINDS[kind], batch=batch, height=height, width=width)
  time_ids = rng.integers(0, 1024, (batch, 6)).astype(np.float32)
  if kind == "sdxl":
    inputs.append(rng.normal(size=(batch, 10)).astype(np.float32))

  def ours(unet, x, text, pooled=None):
    if kind == "sd15":
      return [unet(x, timesteps, (text,) * len(cross_attention_layers(unet)))]
    sizes = {} if pooled is None else dict(text_embeds=pooled, time_ids=time_ids)
    return [unet(x, timesteps, text, **sizes)]

  def theirs(x, text, pooled=None):
    added = dict(text_embeds=pooled, time_ids=torch.from_numpy(time_ids))
    out = original(nchw(x), torch.from_numpy(timesteps), text, added_cond_kwargs=added)
    return [nhwc(out.sample)]

  assert_same(ours, unet, inputs, theirs, original)


def test_mini_kind_with_every_cross_attention_replaced(tmp_path):
  """Each replacement gets its own object, the picture's size and the whole time embedding."""
  original, unet = pair(MINI, tmp_path)
  timesteps = np.array([999, 3])
  layers = cross_attention_layers(unet)
  for _, block in layers:
    block.attn2 = Spy(block.attn2)

  def ours(unet, x, text):
    seen = []
    contexts = [dict(layer=i, text=text, seen=seen) for i in range(len(layers))]
    prediction = unet(x, timesteps, contexts, text=text)
    assert [layer for layer, _, _ in seen] == list(range(len(layers)))
    assert [hw for _, hw, _ in seen] == [(4, 3)] * len(layers)
    return [prediction, *(temb for _, _, temb in seen)]

  def theirs(x, text):
    seen = []
    resnet = original.mid_block.resnets[0]
    hook = resnet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    prediction = original(nchw(x), torch.from_numpy(timesteps), text).sample
    hook.remove()
    return [nhwc(prediction), *seen * len(layers)]

  inputs = latents_and_text(MINI, batch=2, height=8, width=6)
  assert_same(ours, unet, inputs, theirs, original)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_norms_of_faint_features(epsilon):
  """Where the variance is no larger than epsilon, unlike in the networks above."""
  kw = dict(epsilon=epsilon, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = 1e-3 * np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32)
  wanted = nhwc(torch.nn.functional.group_norm(nchw(torch.from_numpy(x)), 2, eps=epsilon))
  assert relative_error(GroupNorm(8, groups=2, **kw)(x), wanted) < TOLERANCE
  wanted = torch.nn.functional.layer_norm(torch.from_numpy(x), (8,), eps=epsilon)
  assert relative_error(LayerNorm(8, **kw)(x), wanted) < TOLERANCE


def test_layers_are_listed_in_execution_order():
  unet = abstract_unet(SDXL)
  assert [path for path, _ in cross_attention_layers(unet)] == [
    f"{place}.transformer_blocks.{i}"
    for place, depth in (
      ("down_blocks.1.attentions.0", 1),
      ("down_blocks.2.attentions.0", 2),
      ("mid_block.attentions.0", 2),
      ("up_blocks.0.attentions.0", 2),
      ("up_blocks.0.attentions.1", 2),
      ("up_blocks.1.attentions.0", 1),
      ("up_blocks.1.attentions.1", 1),
    )
    for i in range(depth)
  ]
  x = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
  with pytest.raises(ValueError, match="7 contexts for 11"):
    jax.eval_shape(lambda x: unet(x, jnp.zeros(1), (None,) * 7), x)


# config.json of the published checkpoints, as far as it differs from the defaults.
REAL = {
  "sd15": dict(cross_attention_dim=768, attention_head_dim=8, sample_size=64),
  "sd21": dict(
    cross_attention_dim=1024,
    attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True,
    upcast_attention=True,
    sample_size=96,
  ),
  "sdxl": dict(
    block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    cross_attention_dim=2048,
    attention_head_dim=[5, 10, 20],
    transformer_layers_per_block=[1, 2, 10],
    use_linear_projection=True,
    upcast_attention=None,
    addition_embed_type="text_time",
    addition_embed_type_num_heads=64,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    sample_size=128,
  ),
}


@pytest.mark.parametrize("name, layers", [("sd15", 16), ("sd21", 16), ("sdxl", 70)])
def test_real_sizes_have_pytorchs_names_and_shapes(name, layers):
  with torch.device("meta"):
    theirs = UNet2DConditionModel(**REAL[name])
  unet = abstract_unet(REAL[name])
  shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
  assert torch_shapes(nnx.state(unet)) == shapes
  assert epsilons(unet) == torch_epsilons(theirs)
  assert len(cross_attention_layers(unet)) == layers


def test_half_precision_computes_and_stores_in_the_dtypes_asked_for():
  unet = abstract_unet(SD2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(unet))} == {jnp.dtype(jnp.bfloat16)}
  graphdef, state = nnx.split(unet)
  out = jax.eval_shape(
    lambda state, *inputs: nnx.merge(graphdef, state)(*inputs),
    state,
    jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    jax.ShapeDtypeStruct((1, 7, 20), jnp.float32),
  )
  assert (out.shape, out.dtype) == ((1, 8, 8, 4), jnp.bfloat16)


def test_weights_of_another_architecture_are_refused_by_name():
  unet = abstract_unet(SD2)
  state = nnx.state(unet)
  tensors = {name: np.zeros(shape, np.float32) for name, shape in torch_shapes(state).items()}
  assert torch_name(("to_out", 0, "kernel")) == "to_out.0.weight"

  missing = {name: array for name, array in tensors.items() if name != "conv_in.bias"}
  with pytest.raises(UserError, match=r"unet.safetensors .* 1 missing \(conv_in.bias\);"):
    from_torch(missing, state, what="unet.safetensors")
  with pytest.raises(UserError, match=r"1 not expected \(lora\)"):
    from_torch({**tensors, "lora": np.zeros(1)}, state)
  with pytest.raises(UserError, match=r"conv_in.bias has the shape \(3,\), the config asks .*16"):
    from_torch({**tensors, "conv_in.bias": np.zeros(3)}, state)


@pytest.mark.parametrize(
  "change, named",
  [
    (dict(class_embed_type="timestep"), "class_embed_type='timestep'"),
    (dict(addition_embed_type="image"), "addition_embed_type='image'"),
    (dict(mid_block_type=None), "mid_block_type=None"),
    (dict(down_block_types=["AttnDownBlock2D"] * 4), "AttnDownBlock2D"),
    (dict(block_out_channels=[320, 640]), "one entry for each of the 2 blocks"),
    (dict(norm_num_groups=30), "norm_num_groups=30"),
    (dict(addition_embed_type="text_time"), "needs addition_time_embed_dim"),
    (dict(transformer_layers_per_block=[[1, 2], 1, 1, 1]), "transformer_layers_per_block"),
    (dict(block_out_chanels=[320]), "block_out_chanels"),
  ],
)
def test_configs_that_are_not_implemented_are_refused_by_name(change, named):
  with pytest.raises(UserError, match=named):
    UNetConfig.from_dict(change)


def test_what_a_config_file_leaves_out_or_marks_as_private_is_ignored():
  assert (
    UNetConfig.from_dict(dict(_class_name="x", dropout=0.0, upcast_attention=None)) == UNetConfig()
  )
