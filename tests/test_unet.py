"""The UNet against diffusers' PyTorch original: values, every gradient, and real sizes' names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import nnx

from cc_jax.errors import UserError
from cc_jax.models.torch_names import from_torch, to_torch, torch_name, torch_shapes
from cc_jax.models.unet import UNet2DCondition, UNetConfig, cross_attention_layers

torch.set_num_threads(2)

# Small networks of each family. Groups hold more than one channel, widths differ wherever two could
# be confused, and the blocks with and without attention lie as in the real ones.
SD15 = dict(
  block_out_channels=[16, 32, 32],
  down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=24,
  attention_head_dim=4,
  act_fn="silu",
)
SD2 = dict(
  block_out_channels=[16, 32],
  down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
  up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
  layers_per_block=2,
  norm_num_groups=4,
  cross_attention_dim=20,
  attention_head_dim=[2, 4],
  use_linear_projection=True,
  upcast_attention=True,
)
SDXL = dict(
  block_out_channels=[16, 32],
  down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
  up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
  layers_per_block=1,
  norm_num_groups=8,
  cross_attention_dim=24,
  transformer_layers_per_block=[1, 2],
  attention_head_dim=[2, 4],
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


class Spy(nnx.Module):
  """Stands where the injection will stand: unpacks its own kind of context, notes what it got."""

  def __init__(self, inner):
    self.inner = inner

  def __call__(self, hidden, context, temb=None, hw=None):
    context["seen"].append((context["layer"], hw, temb))
    return self.inner(hidden, context["text"], temb, hw=hw)


def torch_unet(config):
  torch.manual_seed(0)
  unet = UNet2DConditionModel(**config)
  with torch.no_grad():
    for parameter in unet.parameters():  # norms start at 1 and 0, which would hide a mistake
      parameter += 0.1 * torch.randn(parameter.shape)
  return unet


def jax_unet(config, tensors):
  config = UNetConfig.from_dict(config)
  abstract = nnx.eval_shape(lambda: UNet2DCondition(config, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(abstract)
  return nnx.merge(graphdef, from_torch(tensors, state))


def inputs(config, *, batch, height, width, tokens):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  arrays = dict(
    sample=normal(batch, height, width, config.get("in_channels", 4)),
    timesteps=np.array([999, 3, 421][:batch]),
    context=normal(batch, tokens, config["cross_attention_dim"]),
    probe=normal(batch, height, width, config.get("out_channels", 4)),
  )
  if config.get("addition_embed_type") == "text_time":
    added = dict(
      text_embeds=normal(batch, 10), time_ids=rng.integers(0, 1024, (batch, 6)).astype(np.float32)
    )
  else:
    added = {}
  return arrays, added


def torch_results(unet, arrays, added):
  """The prediction, the time embedding, and the gradients of <prediction, probe>."""
  tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
  sample = tensors["sample"].permute(0, 3, 1, 2).requires_grad_()
  context = tensors["context"].requires_grad_()
  seen = []
  unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
  prediction = unet(
    sample,
    tensors["timesteps"],
    context,
    added_cond_kwargs={name: torch.from_numpy(array) for name, array in added.items()},
  ).sample.permute(0, 2, 3, 1)
  (prediction * tensors["probe"]).sum().backward()
  return dict(
    prediction=prediction.detach().numpy(),
    temb=seen[0].detach().numpy(),
    sample=sample.grad.permute(0, 2, 3, 1).numpy(),
    context=context.grad.numpy(),
    **{name: parameter.grad.numpy() for name, parameter in unet.named_parameters()},
  )


def jax_results(unet, conditioning, arrays, added):
  """The same from ours, by one compilation. `conditioning(context)` -> (context, text) to pass."""
  graphdef, parameters = nnx.split(unet)

  def loss(parameters, sample, context):
    per_layer, text, seen = conditioning(context)
    model = nnx.merge(graphdef, parameters)
    prediction = model(sample, arrays["timesteps"], per_layer, text=text, **added)
    temb = [temb for _, _, temb in seen]
    return (prediction * arrays["probe"]).sum(), (prediction, temb)

  with jax.default_matmul_precision("highest"):
    gradients, (prediction, temb) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(
      parameters, arrays["sample"], arrays["context"]
    )
  named = {name.replace("attn2.inner", "attn2"): g for name, g in to_torch(gradients[0]).items()}
  return dict(prediction=prediction, sample=gradients[1], context=gradients[2], **named), temb


def assert_close(ours, theirs):
  assert ours.keys() == theirs.keys()
  error = {name: float(np.linalg.norm(ours[name] - theirs[name])) for name in theirs}
  size = {name: float(np.linalg.norm(theirs[name])) for name in theirs}
  # A key's bias adds the same to every score of a query: its gradient is zero, and noise here.
  noise = {"add_embedding.pool.k_proj.bias"}
  assert all(size[name] > 1e-3 for name in size.keys() - noise), "a gradient that proves nothing"
  wrong = {n: error[n] / size[n] for n in size.keys() - noise if not error[n] < 1e-4 * size[n]}
  assert not wrong
  assert all(error[name] < 1e-3 for name in noise & size.keys())


def shared(context):
  return context, None, []


def check_against_pytorch(config, *, conditioning=shared, batch, height, width):
  original = torch_unet(config)
  arrays, added = inputs(config, batch=batch, height=height, width=width, tokens=7)
  theirs = torch_results(original, arrays, added)
  unet = jax_unet(config, {name: p.numpy() for name, p in original.state_dict().items()})
  del theirs["temb"]
  ours, _ = jax_results(unet, conditioning, arrays, added)
  assert_close(ours, theirs)


def test_sd15_kind_of_odd_size_and_with_a_context_for_each_layer():
  layers = 2 + 1 + 4
  per_layer = lambda context: ((context,) * layers, None, [])  # noqa: E731
  check_against_pytorch(SD15, conditioning=per_layer, batch=3, height=9, width=13)


def test_sd2_kind():
  check_against_pytorch(SD2, batch=2, height=8, width=6)


def test_sdxl_kind():
  check_against_pytorch(SDXL, batch=3, height=5, width=8)


def test_mini_kind_with_every_cross_attention_replaced():
  original = torch_unet(MINI)
  arrays, added = inputs(MINI, batch=2, height=8, width=8, tokens=7)
  theirs = torch_results(original, arrays, added)
  unet = jax_unet(MINI, {name: p.numpy() for name, p in original.state_dict().items()})
  layers = cross_attention_layers(unet)
  for _, block in layers:
    block.attn2 = Spy(block.attn2)
  seen = []

  def conditioning(context):
    own = tuple(dict(layer=i, text=context, seen=seen) for i in range(len(layers)))
    return own, context, seen

  ours, tembs = jax_results(unet, conditioning, arrays, added)
  temb = theirs.pop("temb")
  assert_close(ours, theirs)
  assert [layer for layer, _, _ in seen] == list(range(len(layers)))
  assert {hw for _, hw, _ in seen} == {(4, 4)}
  assert len(tembs) == len(layers)
  for ours_temb in tembs:
    np.testing.assert_allclose(ours_temb, temb, rtol=1e-4, atol=1e-5)


def test_layers_are_listed_in_execution_order():
  unet = nnx.eval_shape(lambda: UNet2DCondition(UNetConfig.from_dict(SDXL), rngs=nnx.Rngs(0)))
  assert [path for path, _ in cross_attention_layers(unet)] == [
    f"{place}.transformer_blocks.{i}"
    for place in (
      "down_blocks.1.attentions.0",
      "mid_block.attentions.0",
      "up_blocks.0.attentions.0",
      "up_blocks.0.attentions.1",
    )
    for i in range(2)
  ]
  x = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
  with pytest.raises(ValueError, match="7 contexts for 8"):
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
    theirs = UNet2DConditionModel(**REAL[name]).state_dict()
  unet = nnx.eval_shape(lambda: UNet2DCondition(UNetConfig.from_dict(REAL[name]), rngs=nnx.Rngs(0)))
  assert torch_shapes(nnx.state(unet)) == {n: tuple(t.shape) for n, t in theirs.items()}
  assert len(cross_attention_layers(unet)) == layers


def test_half_precision_computes_and_stores_in_the_dtypes_asked_for():
  config = UNetConfig.from_dict(SD2)
  unet = nnx.eval_shape(
    lambda: UNet2DCondition(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  )
  assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(unet))} == {jnp.dtype(jnp.bfloat16)}
  out = jax.eval_shape(
    unet,
    jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    jax.ShapeDtypeStruct((1, 7, 20), jnp.float32),
  )
  assert (out.shape, out.dtype) == ((1, 8, 8, 4), jnp.bfloat16)


def test_weights_of_another_architecture_are_refused_by_name():
  unet = nnx.eval_shape(lambda: UNet2DCondition(UNetConfig.from_dict(SD2), rngs=nnx.Rngs(0)))
  state = nnx.state(unet)
  tensors = {name: np.zeros(shape, np.float32) for name, shape in torch_shapes(state).items()}
  assert torch_name(("to_out", 0, "kernel")) == "to_out.0.weight"

  missing = {name: array for name, array in tensors.items() if name != "conv_in.bias"}
  with pytest.raises(UserError, match=r"unet.safetensors .* 1 missing \(conv_in.bias\);"):
    from_torch(missing, state, what="unet.safetensors")
  with pytest.raises(UserError, match=r"1 not expected \(lora\)"):
    from_torch({**tensors, "lora": np.zeros(1)}, state)
  from_torch({**tensors, "position_ids": np.zeros(1)}, state, ignore=("position_ids",))
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
