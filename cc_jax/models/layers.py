"""The small pieces that the UNet and the VAE share. Images are [B, H, W, C]; kernels are HWIO."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class GroupNorm(nnx.GroupNorm):
  """Group normalisation as PyTorch computes it: two-pass variance, statistics in float32.

  `epsilon` has no default on purpose: it is 1e-5 in the UNet's resnets and 1e-6 in its transformers
  and in the VAE, and the wrong one hardly shows in a picture.
  """

  def __init__(self, channels: int, *, groups: int, epsilon: float, **kw):
    super().__init__(channels, num_groups=groups, epsilon=epsilon, use_fast_variance=False, **kw)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Sums over pixels per channel first, then over a group's channels: contiguous reductions.

    On a CPU four times as fast, forward and backward, as reducing [b, h, w, groups, c / groups].
    """
    x32 = x.astype(jnp.float32)
    shift = -self._group_mean(x32)
    variance = self._group_mean(jnp.square(x32 + shift))
    y = (x32 + shift) * jax.lax.rsqrt(variance + self.epsilon)
    y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
    return y.astype(self.dtype or x.dtype)

  def _group_mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
    b, c = x.shape[0], x.shape[-1]
    per_channel = jnp.mean(x, axis=(1, 2)).reshape(b, self.num_groups, -1)
    mean = jnp.mean(per_channel, axis=-1, keepdims=True)
    return jnp.broadcast_to(mean, per_channel.shape).reshape(b, 1, 1, c)


class LayerNorm(nnx.LayerNorm):
  """Layer normalisation as PyTorch computes it: epsilon 1e-5 (flax has 1e-6), two-pass variance."""

  def __init__(self, width: int, *, epsilon: float = 1e-5, **kw):
    super().__init__(width, epsilon=epsilon, use_fast_variance=False, **kw)


class Linear(nnx.Linear):
  """A linear layer for trained weights: rows of all leading axes in one matrix.

  With more axes XLA:CPU (jax 0.10) lays the output's gradient out anew for the kernel's, and
  computes the activation's derivative a second time for that: twice the time of an MLP's gradient
  (`benchmarks/linear.py`). The batch must come first: merged behind other axes it would not stay
  sharded.
  """

  def __call__(self, inputs: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
    return rows.reshape(*inputs.shape[:-1], rows.shape[-1])


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, padding=1, **kw) -> nnx.Conv:
  """A 3x3 convolution with PyTorch's explicit padding ('SAME' pads strided inputs on one side)."""
  return nnx.Conv(in_channels, out_channels, (3, 3), strides=stride, padding=padding, **kw)


def conv1x1(in_channels: int, out_channels: int, **kw) -> nnx.Conv:
  """A 1x1 convolution; its kernel keeps the four dimensions of PyTorch's checkpoints."""
  return nnx.Conv(in_channels, out_channels, (1, 1), padding=0, **kw)


class Identity(nnx.Module):
  """Takes the place of a PyTorch module without parameters, so that numbered children agree."""

  def __call__(self, x):
    return x


class ResnetBlock2D(nnx.Module):
  """norm, silu, conv, twice, around a skip; between the halves the time embedding is added.

  diffusers: models/resnet.py, ResnetBlock2D with `time_embedding_norm="default"`.
  `temb_channels=None` (the VAE) leaves the time embedding out.
  """

  def __init__(
    self, in_channels: int, out_channels: int, *, temb_channels: int | None, groups: int,
    epsilon: float, **kw,
  ):
    self.norm1 = GroupNorm(in_channels, groups=groups, epsilon=epsilon, **kw)
    self.conv1 = conv3x3(in_channels, out_channels, **kw)
    if temb_channels is not None:
      self.time_emb_proj = nnx.Linear(temb_channels, out_channels, **kw)
    self.norm2 = GroupNorm(out_channels, groups=groups, epsilon=epsilon, **kw)
    self.conv2 = conv3x3(out_channels, out_channels, **kw)
    if in_channels != out_channels:
      self.conv_shortcut = conv1x1(in_channels, out_channels, **kw)

  def __call__(
    self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"] | None = None
  ) -> Float[Array, "b h w c_out"]:
    h = self.conv1(jax.nn.silu(self.norm1(x)))
    if temb is not None:
      h = h + self.time_emb_proj(jax.nn.silu(temb))[:, None, None, :]
    h = self.conv2(jax.nn.silu(self.norm2(h)))
    return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample2D(nnx.Module):
  """Halves height and width by a strided convolution.

  diffusers: models/downsampling.py. The UNet pads every side by one; the VAE (`asymmetric=True`)
  pads the bottom and the right only.
  """

  def __init__(self, channels: int, *, asymmetric: bool = False, **kw):
    padding = ((0, 1), (0, 1)) if asymmetric else 1
    self.conv = conv3x3(channels, channels, stride=2, padding=padding, **kw)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    return self.conv(x)


class Upsample2D(nnx.Module):
  """Doubles height and width by repetition, then convolves.

  diffusers: models/upsampling.py, nearest interpolation. With `size=(h, w)` the result has that
  size, which must be 2n or 2n - 1 for an input of n (what a stride of two made n from): there
  PyTorch's nearest interpolation equals the doubled image without its last row or column.
  """

  def __init__(self, channels: int, **kw):
    self.conv = conv3x3(channels, channels, **kw)

  def __call__(
    self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
  ) -> Float[Array, "b h2 w2 c"]:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    if size is not None:
      x = x[:, : size[0], : size[1], :]
    return self.conv(x)


def sinusoidal_embedding(
  timesteps: Float[Array, "*n"] | Int[Array, "*n"], width: int, *, flip_sin_to_cos: bool,
  freq_shift: float,
) -> Float[Array, "*n width"]:
  """Sines and cosines of `timesteps` at `width // 2` frequencies from 1 down to 1/10000; float32.

  diffusers: models/embeddings.py, get_timestep_embedding. `flip_sin_to_cos` puts the cosines first;
  an odd `width` is padded by a zero.
  """
  half = width // 2
  exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angle = jnp.asarray(timesteps, jnp.float32)[..., None] * jnp.exp(exponent)
  waves = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
  padding = jnp.zeros((*angle.shape[:-1], width % 2), jnp.float32)
  return jnp.concatenate([*waves, padding], axis=-1)


class TimestepEmbedding(nnx.Module):
  """linear, silu, linear (diffusers: models/embeddings.py)."""

  def __init__(self, in_channels: int, width: int, **kw):
    self.linear_1 = nnx.Linear(in_channels, width, **kw)
    self.linear_2 = nnx.Linear(width, width, **kw)

  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
    return self.linear_2(jax.nn.silu(self.linear_1(x)))
