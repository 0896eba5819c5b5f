"""Down, middle and up blocks of the UNet (diffusers: models/unets/unet_2d_blocks.py).

One class serves `DownBlock2D` and `CrossAttnDownBlock2D`, another the two up blocks: they differ by
an `attentions` list, which also is the only difference between their checkpoints.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.models.attention import Transformer2D
from cc_jax.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from cc_jax.models.remat import rematerialised


@dataclass(frozen=True)
class BlockSizes:
  """What the layers of one block have in common. `depth=0`: a block without attention."""

  channels: int
  temb_channels: int
  groups: int
  epsilon: float
  depth: int
  heads: int
  context_width: int
  linear_projection: bool

  def resnet(self, in_channels: int, **kw) -> ResnetBlock2D:
    return ResnetBlock2D(
      in_channels, self.channels, temb_channels=self.temb_channels, groups=self.groups,
      epsilon=self.epsilon, **kw,
    )

  def transformer(self, **kw) -> Transformer2D:
    return Transformer2D(
      self.channels, depth=self.depth, heads=self.heads, context_width=self.context_width,
      groups=self.groups, linear_projection=self.linear_projection, **kw,
    )


class Contexts:
  """Deals the conditioning of the cross-attention layers out, in execution order."""

  def __init__(self, contexts: tuple[Any, ...]):
    self._rest = contexts

  def take(self, n: int) -> tuple[Any, ...]:
    taken, self._rest = self._rest[:n], self._rest[n:]
    return taken


class _Block(nnx.Module):
  """resnets, each followed by a transformer if the block has cross-attention."""

  remat = "none"  # of each layer; see models/remat.py

  def _layer(self, i: int, x, temb, contexts: Contexts):
    transformer, taken = None, ()
    if hasattr(self, "attentions"):
      transformer = self.attentions[i]
      taken = contexts.take(len(transformer.transformer_blocks))

    def layer(x, temb):
      x = self.resnets[i](x, temb)
      return x if transformer is None else transformer(x, taken, temb)

    return rematerialised(self.remat, layer)(x, temb)


class DownBlock(_Block):
  """`layers` resnets (and transformers), then half the size unless it is the last block."""

  def __init__(self, in_channels: int, sizes: BlockSizes, *, layers: int, downsample: bool, **kw):
    inputs = [in_channels] + [sizes.channels] * (layers - 1)
    self.resnets = nnx.List(sizes.resnet(channels, **kw) for channels in inputs)
    if sizes.depth:
      self.attentions = nnx.List(sizes.transformer(**kw) for _ in inputs)
    if downsample:
      self.downsamplers = nnx.List([Downsample2D(sizes.channels, **kw)])

  def __call__(
    self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"], contexts: Contexts
  ) -> tuple[Float[Array, "b h2 w2 c2"], list[Array]]:
    """Returns the block's output, and every layer's output as skips for the way up."""
    skips = []
    for i in range(len(self.resnets)):
      x = self._layer(i, x, temb, contexts)
      skips.append(x)
    if hasattr(self, "downsamplers"):
      x = self.downsamplers[0](x)
      skips.append(x)
    return x, skips


class MidBlock(nnx.Module):
  """resnet, transformer, resnet (`UNetMidBlock2DCrossAttn`)."""

  remat = "none"

  def __init__(self, sizes: BlockSizes, **kw):
    self.resnets = nnx.List(sizes.resnet(sizes.channels, **kw) for _ in range(2))
    self.attentions = nnx.List([sizes.transformer(**kw)])

  def __call__(
    self, x: Float[Array, "b h w c"], temb: Float[Array, "b e"], contexts: Contexts
  ) -> Float[Array, "b h w c"]:
    transformer = self.attentions[0]
    taken = contexts.take(len(transformer.transformer_blocks))

    def layer(x, temb):
      return self.resnets[1](transformer(self.resnets[0](x, temb), taken, temb), temb)

    return rematerialised(self.remat, layer)(x, temb)


class UpBlock(_Block):
  """A resnet (and transformer) per skip, then the next skip's size unless it is the last block."""

  def __init__(
    self, in_channels: int, skip_channels: list[int], sizes: BlockSizes, *, upsample: bool, **kw
  ):
    """`skip_channels`: channels of the skips in the order in which they are used."""
    inputs = [in_channels] + [sizes.channels] * (len(skip_channels) - 1)
    self.resnets = nnx.List(
      sizes.resnet(channels + skip, **kw) for channels, skip in zip(inputs, skip_channels)
    )
    if sizes.depth:
      self.attentions = nnx.List(sizes.transformer(**kw) for _ in inputs)
    if upsample:
      self.upsamplers = nnx.List([Upsample2D(sizes.channels, **kw)])

  def __call__(
    self, x: Float[Array, "b h w c"], skips: list[Float[Array, "b h2 w2 c2"]],
    temb: Float[Array, "b e"], contexts: Contexts,
  ) -> Float[Array, "b h3 w3 c3"]:
    """Takes what it needs from the end of `skips`, which it shortens."""
    for i in range(len(self.resnets)):
      x = self._layer(i, jnp.concatenate([x, skips.pop()], axis=-1), temb, contexts)
    if hasattr(self, "upsamplers"):
      # The next skip's size, not twice ours: a stride of two may have rounded an odd size up.
      x = self.upsamplers[0](x, skips[-1].shape[1:3])
    return x
