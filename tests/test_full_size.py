"""Stable Diffusion 1.5's networks at their real size against PyTorch, with random weights.

The error of bfloat16 parameters and arithmetic is printed. When this was written it was 0.9 % (text
encoder), 2.3 % (VAE) and 1.4 % (UNet). Peak memory is below 8 GB.
"""

import gc
from collections.abc import Mapping
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from torch_parity import named_as_ours, relative_error, to_nchw, to_nhwc

from cc_jax.bases.torch_names import from_torch
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.rngs import abstract
from cc_jax.models.unet import UNet2DCondition, UNetConfig
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig

pytestmark = pytest.mark.slow

UNET = dict(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
VAE = dict(
  block_out_channels=[128, 256, 512, 512],
  down_block_types=["DownEncoderBlock2D"] * 4,
  up_block_types=["UpDecoderBlock2D"] * 4,
  layers_per_block=2,
  sample_size=512,
)
TEXT = dict(
  hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
  projection_dim=768, hidden_act="quick_gelu", eos_token_id=49407,
)  # fmt: skip


class HandedOver(Mapping):
  """PyTorch's parameters under our names. What is taken is no longer in the PyTorch model."""

  def __init__(self, module: nnx.Module, original: torch.nn.Module):
    self.parameters = named_as_ours(module, original)

  def __getitem__(self, name: str) -> np.ndarray:
    array = self.parameters[name].detach().numpy()
    self.parameters[name].data = torch.empty(0)
    return array

  def __iter__(self):
    return iter(self.parameters)

  def __len__(self):
    return len(self.parameters)


def random_original(make) -> torch.nn.Module:
  """With norms and biases off their ones and zeros."""
  torch.manual_seed(0)
  original = make().eval()
  with torch.no_grad():
    for parameter in original.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.1 * torch.randn(parameter.shape))
  return original


def check(cls, config, original, run_ours, run_theirs, inputs, show) -> None:
  """Relative errors of every output: below 1e-3 in float32; shown, and below 0.05, in bfloat16."""
  with torch.no_grad():
    wanted = run_theirs(original, *inputs)

  def ours(dtype) -> nnx.Module:
    return abstract(lambda rngs: cls(config, dtype=dtype, param_dtype=dtype, rngs=rngs))

  state = nnx.state(ours(jnp.float32), nnx.Param)
  state = from_torch(HandedOver(ours(jnp.float32), original), state)
  for dtype, limit in ((jnp.float32, 1e-3), (jnp.bfloat16, 0.05)):
    state = jax.tree.map(lambda x: x.astype(dtype), state)  # noqa: B023
    graph = nnx.graphdef(ours(dtype))
    with jax.default_matmul_precision("highest"):
      outs = jax.jit(lambda state, inputs: run_ours(nnx.merge(graph, state), *inputs))(  # noqa: B023
        state, inputs
      )
    errors = [relative_error(np.asarray(a, np.float32), b) for a, b in zip(outs, wanted)]
    show(f"{cls.__name__}, {np.dtype(dtype).name}: {', '.join(f'{e:.1e}' for e in errors)}")
    assert len(errors) == len(wanted) and max(errors) < limit
  del state
  gc.collect()


@pytest.fixture
def show(capsys):
  def write(line):
    with capsys.disabled():
      peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
      print(f"\n{line}; peak memory {int(peak.split()[1]) / 1e6:.1f} GB")

  return write


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_text_encoder(show):
  settings = transformers.CLIPTextConfig(**TEXT)
  ids = np.random.default_rng(0).integers(0, 49406, (2, 77))
  ids[0, 9:] = ids[1, 76] = 49407
  check(
    CLIPTextModel,
    CLIPTextConfig.from_dict(TEXT),
    random_original(lambda: transformers.CLIPTextModel(settings)),
    lambda model, ids: [*model(ids)[:2]],
    lambda model, ids: [*model(torch.from_numpy(np.asarray(ids))).values()],
    [ids],
    show,
  )


def test_vae(show):
  def run_theirs(model, x, z):
    posterior = model.encode(to_nchw(x)).latent_dist
    outs = [posterior.mean, posterior.logvar, model.decode(to_nchw(z)).sample]
    return [to_nhwc(out) for out in outs]

  check(
    AutoencoderKL,
    AutoencoderKLConfig.from_dict(VAE),
    random_original(lambda: diffusers.AutoencoderKL(**VAE)),
    lambda model, x, z: [*model.encode(x), model.decode(z)],
    run_theirs,
    [normal(1, 72, 104, 3), normal(1, 9, 13, 4)],
    show,
  )


def test_unet(show):
  check(
    UNet2DCondition,
    UNetConfig.from_dict(UNET),
    random_original(lambda: diffusers.UNet2DConditionModel(**UNET)),
    lambda model, x, text: [model(x, jnp.array([981]), text)],
    lambda model, x, text: [
      to_nhwc(model(to_nchw(x), torch.tensor([981]), torch.from_numpy(text)).sample)
    ],
    [normal(1, 9, 17, 4), normal(1, 77, 768, seed=1)],
    show,
  )
