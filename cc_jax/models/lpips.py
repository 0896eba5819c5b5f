"""LPIPS (Zhang et al. 2018) on AlexNet or VGG16, version 0.1 (PerceptualSimilarity's lpips.py).

Names are those of `lpips.LPIPS(net=...).state_dict()`: `net.slice2.3.weight` is torchvision's
convolution 3, `lin0.model.1.weight` the first linear layer behind its dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.errors import UserError
from cc_jax.models.layers import Identity

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10  # of normalize_tensor, added to the length
_POOL = "pool"


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution, which a relu follows; `index` is its place in torchvision's `features`."""

  index: int
  channels: int
  kernel: int = 3
  stride: int = 1
  padding: int = 1


# Slices, each of which ends where LPIPS reads; "pool" halves the size.
_VGG_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_VGG_INDICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
TOWERS: dict[str, tuple[tuple[Conv | str, ...], ...]] = {
  "alex": (
    (Conv(0, 64, kernel=11, stride=4, padding=2),),
    (_POOL, Conv(3, 192, kernel=5, padding=2)),
    (_POOL, Conv(6, 384)),
    (Conv(8, 256),),
    (Conv(10, 256),),
  ),
  "vgg": tuple(
    ((_POOL,) if slice_index else ()) + tuple(map(Conv, indices, channels))
    for slice_index, (indices, channels) in enumerate(zip(_VGG_INDICES, _VGG_CHANNELS, strict=True))
  ),
}
_WINDOW = {"alex": 3, "vgg": 2}  # of the pooling, whose stride is 2


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
  """Which tower; `config.json` of a folder has it as `net`."""

  net: str = "alex"  # or vgg

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> LpipsConfig:
    """Raises UserError for a tower that we do not have."""
    net = values.get("net")
    if net not in TOWERS:
      raise UserError(f"LPIPS config: net is {net!r}; we have {', '.join(TOWERS)}")
    return cls(net)

  @property
  def smallest(self) -> int:
    """Pixels a side, from which every layer has a pixel."""
    return {"alex": 31, "vgg": 16}[self.net]


class Slice(nnx.Module):
  """Convolutions with their relus between two readings; attributes are torchvision's numbers."""

  def __init__(self, parts: tuple[Conv | str, ...], inputs: int, window: int, **kw):
    self.parts, self.window = parts, window
    for part in parts:
      if isinstance(part, Conv):
        setattr(self, str(part.index), nnx.Conv(
          inputs, part.channels, (part.kernel,) * 2, strides=part.stride,
          padding=((part.padding,) * 2,) * 2, **kw))  # fmt: skip
        inputs = part.channels

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    for part in self.parts:
      if isinstance(part, Conv):
        x = jax.nn.relu(getattr(self, str(part.index))(x))
      else:
        x = nnx.max_pool(x, (self.window,) * 2, strides=(2, 2))
    return x


class Tower(nnx.Module):
  """The convolutions of a classifier, read after five of its relus."""

  def __init__(self, net: str, **kw):
    inputs = 3
    for index, parts in enumerate(TOWERS[net], start=1):
      setattr(self, f"slice{index}", Slice(parts, inputs, _WINDOW[net], **kw))
      inputs = parts[-1].channels
    self.count = len(TOWERS[net])

  def __call__(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b h2 w2 d"]]:
    outputs = []
    for index in range(1, self.count + 1):
      x = getattr(self, f"slice{index}")(x)
      outputs.append(x)
    return outputs


class Linear(nnx.Module):
  """A weight per channel; behind a dropout that does nothing here."""

  def __init__(self, channels: int, **kw):
    conv = nnx.Conv(channels, 1, (1, 1), use_bias=False, **kw)
    self.model = nnx.List([Identity(), conv])

  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w 1"]:
    return self.model[1](x)


class Lpips(nnx.Module):
  """The perceptual distance of two pictures."""

  def __init__(
    self, config: LpipsConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.net = Tower(config.net, **kw)
    for index, parts in enumerate(TOWERS[config.net]):
      setattr(self, f"lin{index}", Linear(parts[-1].channels, **kw))

  def __call__(
    self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
  ) -> Float[Array, " b"]:
    """Pictures in [-1, 1]. 0 for equal ones; weights are >= 0, and so is the distance."""
    # One pass over both. Rows of a pair stay neighbours, so that a sharded batch stays where it is.
    rows = jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
    total = jnp.zeros(len(a), jnp.float32)
    for index, output in enumerate(self.features(rows)):
      pairs = _unit(output).reshape(len(a), 2, *output.shape[1:])
      difference = jnp.square(pairs[:, 0] - pairs[:, 1])
      total += getattr(self, f"lin{index}")(difference).mean((1, 2, 3))
    return total

  def features(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b h2 w2 d"]]:
    """The tower's five readings of pictures in [-1, 1]."""
    shift, scale = (jnp.asarray(values, jnp.float32) for values in (_SHIFT, _SCALE))
    return self.net((x - shift) / scale)

  @staticmethod
  def hub_name(name: str) -> str | None:
    """Our name of a tensor of lpips' state_dict, which has the linear layers twice."""
    return None if name.startswith(("lins.", "scaling_layer.")) else name


def _unit(x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
  return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)) + _EPSILON)
