"""AutoencoderKL, the image autoencoder of Stable Diffusion (diffusers: autoencoders/vae.py).

Attribute names are PyTorch's module names. The epsilon of every group norm is 1e-6 here, where the
UNet's resnets have 1e-5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from cc_jax.errors import UserError
from cc_jax.models.attention_kernels import WithAttention, dot_product_attention
from cc_jax.models.layers import (
  Downsample2D,
  GroupNorm,
  Identity,
  ResnetBlock2D,
  Upsample2D,
  conv1x1,
  conv3x3,
)

EPSILON = 1e-6
# Module names inside an attention before diffusers 0.12, and the present ones.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
  """The fields of a VAE's `config.json`; defaults are diffusers'."""

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  sample_size: int = 32
  scaling_factor: float = 0.18215  # latents * scaling_factor is what the UNet sees
  shift_factor: float | None = None  # subtracted before the scaling, if set
  force_upcast: bool = True  # float16 overflows in this VAE: it then computes in float32
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> AutoencoderKLConfig:
    """Reads a `config.json`.

    Raises:
      UserError: a key is unknown, or a value is one that we do not implement.
    """
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    channels = tuple(values.get("block_out_channels", cls.block_out_channels))
    # Keys with only one value that we implement.
    fixed = {
      "act_fn": ("silu", "swish"),
      "down_block_types": (["DownEncoderBlock2D"] * len(channels),),
      "up_block_types": (["UpDecoderBlock2D"] * len(channels),),
      "latents_mean": (None,),
      "latents_std": (None,),
    }
    for key, allowed in fixed.items():
      value = values.pop(key, allowed[0])
      value = list(value) if isinstance(value, tuple) else value
      if value not in allowed:
        raise UserError(f"VAE config: {key} is {value!r}; we implement {allowed[0]!r}")
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
      raise UserError(f"VAE config: we do not implement {unknown[0]!r}")
    config = cls(**{**values, "block_out_channels": channels})
    if any(width % config.norm_num_groups for width in channels):
      raise UserError(
        f"VAE config: norm_num_groups {config.norm_num_groups} does not divide all of "
        f"block_out_channels {list(channels)}"
      )
    return config

  def to_dict(self) -> dict[str, Any]:
    """The fields in the words of diffusers' `config.json`."""
    blocks = len(self.block_out_channels)
    return {
      **dataclasses.asdict(self),
      "act_fn": "silu",
      "down_block_types": ["DownEncoderBlock2D"] * blocks,
      "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }

  @property
  def factor(self) -> int:
    """Image pixels per latent, along each side."""
    return 2 ** (len(self.block_out_channels) - 1)


class VAEAttention(WithAttention):
  """One-headed self-attention over the pixels, with a group norm before and a residual around."""

  def __init__(self, channels: int, groups: int, **kw):
    self.group_norm = GroupNorm(channels, groups=groups, epsilon=EPSILON, **kw)
    self.to_q = nnx.Linear(channels, channels, **kw)
    self.to_k = nnx.Linear(channels, channels, **kw)
    self.to_v = nnx.Linear(channels, channels, **kw)
    self.to_out = nnx.List([nnx.Linear(channels, channels, **kw), Identity()])

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    batch, height, width, channels = x.shape
    tokens = self.group_norm(x).reshape(batch, height * width, 1, channels)
    q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
    out = dot_product_attention(q, k, v, self.kernels)
    return x + self.to_out[0](out).reshape(x.shape)


class MidBlock(nnx.Module):
  """resnet, attention (if any), resnet."""

  def __init__(self, channels: int, config: AutoencoderKLConfig, **kw):
    self.resnets = nnx.List([_resnet(channels, channels, config, **kw) for _ in range(2)])
    if config.mid_block_add_attention:
      self.attentions = nnx.List([VAEAttention(channels, config.norm_num_groups, **kw)])

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    x = self.resnets[0](x)
    if hasattr(self, "attentions"):
      x = self.attentions[0](x)
    return self.resnets[1](x)


class DownEncoderBlock2D(nnx.Module):
  """Resnets, then half the size unless it is the last block."""

  def __init__(self, c_in: int, c_out: int, config: AutoencoderKLConfig, *, last: bool, **kw):
    widths = [c_in] + [c_out] * config.layers_per_block
    self.resnets = nnx.List([_resnet(a, b, config, **kw) for a, b in zip(widths, widths[1:])])
    if not last:
      self.downsamplers = nnx.List([Downsample2D(c_out, asymmetric=True, **kw)])

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    for resnet in self.resnets:
      x = resnet(x)
    return self.downsamplers[0](x) if hasattr(self, "downsamplers") else x


class UpDecoderBlock2D(nnx.Module):
  """Resnets, one more than the encoder has, then twice the size unless it is the last block."""

  def __init__(self, c_in: int, c_out: int, config: AutoencoderKLConfig, *, last: bool, **kw):
    widths = [c_in] + [c_out] * (config.layers_per_block + 1)
    self.resnets = nnx.List([_resnet(a, b, config, **kw) for a, b in zip(widths, widths[1:])])
    if not last:
      self.upsamplers = nnx.List([Upsample2D(c_out, **kw)])

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    for resnet in self.resnets:
      x = resnet(x)
    return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Encoder(nnx.Module):
  """Image to the moments before `quant_conv`."""

  def __init__(self, config: AutoencoderKLConfig, **kw):
    widths = config.block_out_channels
    self.conv_in = conv3x3(config.in_channels, widths[0], **kw)
    ends = [index == len(widths) - 1 for index in range(len(widths))]
    self.down_blocks = nnx.List([
      DownEncoderBlock2D(a, b, config, last=last, **kw)
      for a, b, last in zip((widths[0], *widths), widths, ends)
    ])
    self.mid_block = MidBlock(widths[-1], config, **kw)
    self.conv_norm_out = GroupNorm(
      widths[-1], groups=config.norm_num_groups, epsilon=EPSILON, **kw
    )
    self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels, **kw)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
  """Latents after `post_quant_conv` to the image."""

  def __init__(self, config: AutoencoderKLConfig, **kw):
    widths = config.block_out_channels[::-1]
    self.conv_in = conv3x3(config.latent_channels, widths[0], **kw)
    self.mid_block = MidBlock(widths[0], config, **kw)
    ends = [index == len(widths) - 1 for index in range(len(widths))]
    self.up_blocks = nnx.List([
      UpDecoderBlock2D(a, b, config, last=last, **kw)
      for a, b, last in zip((widths[0], *widths), widths, ends)
    ])
    self.conv_norm_out = GroupNorm(
      widths[-1], groups=config.norm_num_groups, epsilon=EPSILON, **kw
    )
    self.conv_out = conv3x3(widths[-1], config.out_channels, **kw)

  def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    x = self.mid_block(self.conv_in(z))
    for block in self.up_blocks:
      x = block(x)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
  """Images in [-1, 1] to latents `config.factor` times smaller, and back."""

  def __init__(
    self, config: AutoencoderKLConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    """Parameters are kept in `param_dtype`; the network computes, and answers, in `dtype`.

    SDXL's activations pass float16's 65504. A config with `force_upcast` (also one that says
    nothing, as in diffusers) therefore computes in float32 where float16 is asked for, in both
    directions like diffusers' StableDiffusionXLImg2ImgPipeline. bfloat16 has float32's range.
    """
    if config.force_upcast and jnp.dtype(dtype) == jnp.float16:
      dtype = jnp.float32
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.encoder = Encoder(config, **kw)
    self.decoder = Decoder(config, **kw)
    latents = config.latent_channels
    if config.use_quant_conv:
      self.quant_conv = conv1x1(2 * latents, 2 * latents, **kw)
    if config.use_post_quant_conv:
      self.post_quant_conv = conv1x1(latents, latents, **kw)

  def encode(
    self, x: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
    """Mean and log-variance of the latents, not scaled; the log-variance is kept in [-30, 20]."""
    moments = self.encoder(x)
    if self.config.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: Float[Array, "b h2 w2 z"]) -> Float[Array, "b h w c"]:
    """The image of latents that the caller has already divided by `scaling_factor`; not clipped."""
    return self.decoder(self.post_quant_conv(z) if self.config.use_post_quant_conv else z)

  @staticmethod
  def hub_name(name: str) -> str:
    """Our name of a tensor in a weight file, for files with the attention's old names too."""
    head, _, kind = name.rpartition(".")
    path, _, module = head.rpartition(".")
    if ".attentions." in name and module in _OLD_ATTENTION:
      return f"{path}.{_OLD_ATTENTION[module]}.{kind}"
    return name

  @staticmethod
  def hub_tensor(name: str, tensor: np.ndarray) -> np.ndarray:
    """The attention's matrices without the window of one pixel that old files gave them."""
    if ".attentions." in name and tensor.ndim > 2 and set(tensor.shape[2:]) == {1}:
      return tensor.reshape(tensor.shape[:2])
    return tensor


def _resnet(c_in: int, c_out: int, config: AutoencoderKLConfig, **kw) -> ResnetBlock2D:
  return ResnetBlock2D(
    c_in, c_out, temb_channels=None, groups=config.norm_num_groups, epsilon=EPSILON, **kw
  )


def latents_to_images(vae: nnx.Module, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
  """Latents in the UNet's units -> pixels in [0, 1], clipped, float32."""
  z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
  return jnp.clip(vae.decode(z).astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


def images_to_latents(
  vae: nnx.Module, images: UInt8[Array, "b h w 3"],
  noise_of: Callable[[tuple[int, ...]], Float[Array, "b h w c"]] | None = None,
) -> Float[Array, "b h w c"]:
  """Pixels -> latents in the UNet's units, float32: the VAE's mean or a sample of its posterior.

  `noise_of`: a latent's shape [h, w, c] -> unit normal noise, for a sample.
  """
  return moments_to_latents(
    vae.config, *vae.encode(images.astype(jnp.float32) / 127.5 - 1), noise_of)


def moments_to_latents(config: AutoencoderKLConfig, z, logvar, noise_of=None) -> jax.Array:
  """The same from what `AutoencoderKL.encode` says of the pixels, [B, h, w, c] each."""
  z = z.astype(jnp.float32)
  if noise_of is not None:
    # The bounds of diffusers' DiagonalGaussianDistribution.
    deviation = jnp.exp(0.5 * jnp.clip(logvar.astype(jnp.float32), -30.0, 20.0))
    z = z + deviation * noise_of(z.shape[1:])
  return (z - (config.shift_factor or 0.0)) * config.scaling_factor
