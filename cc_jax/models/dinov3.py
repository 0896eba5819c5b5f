"""DINOv3's vision transformer (transformers' modeling_dinov3_vit.py): rotary positions, registers.

There is no table of positions: each attention turns queries and keys of the patches by angles of
their centres, so any size goes. Attribute names are those of the published files
(facebook/dinov3-vits16-pretrain-lvd1689m and its siblings), which have the layers at the top.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.errors import UserError
from cc_jax.models.attention_kernels import WithAttention, dot_product_attention
from cc_jax.models.clip_layers import ACTIVATIONS, checked_config, layer_norm
from cc_jax.models.dino import DinoOutput, LayerScale

_MODEL_TYPE, _ARCHITECTURE = "dinov3_vit", "DINOv3ViTModel"


@dataclasses.dataclass(frozen=True)
class Dinov3Config:
  """The fields of the encoder's `config.json` that matter; defaults are transformers' (ViT-S)."""

  hidden_size: int = 384
  num_hidden_layers: int = 12
  num_attention_heads: int = 6
  intermediate_size: int = 1536
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-5
  image_size: int = 224
  patch_size: int = 16
  num_channels: int = 3
  num_register_tokens: int = 0  # published models have 4
  rope_theta: float = 100.0
  query_bias: bool = True
  key_bias: bool = False
  value_bias: bool = True
  proj_bias: bool = True
  mlp_bias: bool = True
  use_gated_mlp: bool = False

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Dinov3Config:
    """Reads a `config.json`.

    Raises:
      UserError: it is of another architecture, or has a value that we do not implement.
    """
    of_type = {_MODEL_TYPE: _ARCHITECTURE}
    kind = (values.get("architectures") or [of_type.get(values.get("model_type"))])[0]
    if kind != _ARCHITECTURE:
      raise UserError(f"DINOv3 config: architectures is {kind!r}; we have {_ARCHITECTURE!r}")
    # transformers 5 writes what rotary positions need into a section of their own.
    rope = values.get("rope_parameters") or {}
    config = checked_config(cls, {**rope, **values}, what="DINOv3 config")
    if config.hidden_size // config.num_attention_heads % 4:
      raise UserError(
        f"DINOv3 config: a head has {config.hidden_size // config.num_attention_heads} channels; "
        "rotary positions in two dimensions take a multiple of 4"
      )
    return config


class Dinov3Embeddings(nnx.Module):
  """The class token, the registers, and the patches."""

  def __init__(self, config: Dinov3Config, *, param_dtype, rngs, **kw):
    def tokens(count: int) -> nnx.Param:
      noise = jax.random.normal(rngs.params(), (1, count, config.hidden_size), param_dtype)
      return nnx.Param(0.02 * noise)

    self.cls_token = tokens(1)
    if config.num_register_tokens:
      self.register_tokens = tokens(config.num_register_tokens)
    self.registers = config.num_register_tokens
    side = config.patch_size
    self.patch_embeddings = nnx.Conv(
      config.num_channels, config.hidden_size, (side, side), strides=side, padding="VALID",
      param_dtype=param_dtype, rngs=rngs, **kw,
    )

  def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b s d"]:
    patches = self.patch_embeddings(pixels)
    batch, _, _, width = patches.shape
    parts = [self.cls_token] + ([self.register_tokens] if self.registers else [])
    parts = [jnp.broadcast_to(part[...], (batch, *part.shape[1:])) for part in parts]
    return jnp.concatenate([*parts, patches.reshape(batch, -1, width)], axis=1)


class Dinov3Attention(WithAttention):
  """Multi-head self-attention; patches know their places by rotation, the tokens before do not."""

  def __init__(self, config: Dinov3Config, **kw):
    self.heads = config.num_attention_heads
    width = config.hidden_size
    self.q_proj = nnx.Linear(width, width, use_bias=config.query_bias, **kw)
    self.k_proj = nnx.Linear(width, width, use_bias=config.key_bias, **kw)
    self.v_proj = nnx.Linear(width, width, use_bias=config.value_bias, **kw)
    self.o_proj = nnx.Linear(width, width, use_bias=config.proj_bias, **kw)

  def __call__(
    self, x: Float[Array, "b s d"], angles: Float[np.ndarray, "p h"]
  ) -> Float[Array, "b s d"]:
    split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
    q, k, v = (part(x).reshape(split) for part in (self.q_proj, self.k_proj, self.v_proj))
    q, k = _rotated(q, angles), _rotated(k, angles)
    return self.o_proj(dot_product_attention(q, k, v, self.kernels).reshape(x.shape))


class Dinov3MLP(nnx.Module):
  """up, activation, down; gated (SwiGLU) in the largest models."""

  def __init__(self, config: Dinov3Config, **kw):
    width, inner = config.hidden_size, config.intermediate_size
    self.activation, self.gated = config.hidden_act, config.use_gated_mlp
    kw = dict(use_bias=config.mlp_bias, **kw)
    if self.gated:
      self.gate_proj = nnx.Linear(width, inner, **kw)
    self.up_proj = nnx.Linear(width, inner, **kw)
    self.down_proj = nnx.Linear(inner, width, **kw)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    act, up = ACTIVATIONS[self.activation], self.up_proj(x)
    return self.down_proj(act(self.gate_proj(x)) * up if self.gated else act(up))


class Dinov3Layer(nnx.Module):
  """Pre-norm attention and MLP, each scaled per channel and added."""

  def __init__(self, config: Dinov3Config, *, param_dtype, **kw):
    width, eps = config.hidden_size, config.layer_norm_eps
    kw = dict(param_dtype=param_dtype, **kw)
    self.norm1 = layer_norm(width, eps, **kw)
    self.attention = Dinov3Attention(config, **kw)
    self.layer_scale1 = LayerScale(width, param_dtype)
    self.norm2 = layer_norm(width, eps, **kw)
    self.mlp = Dinov3MLP(config, **kw)
    self.layer_scale2 = LayerScale(width, param_dtype)

  def __call__(
    self, x: Float[Array, "b s d"], angles: Float[np.ndarray, "p h"]
  ) -> Float[Array, "b s d"]:
    x = x + self.layer_scale1(self.attention(self.norm1(x), angles))
    return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Dinov3(nnx.Module):
  """The image encoder; token 0 of the result is CLS, then the registers, then the patches."""

  def __init__(
    self, config: Dinov3Config, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.embeddings = Dinov3Embeddings(config, **kw)
    self.layer = nnx.List(Dinov3Layer(config, **kw) for _ in range(config.num_hidden_layers))
    self.norm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)

  def __call__(self, pixel_values: Float[Array, "b h w c"]) -> DinoOutput:
    """Encodes normalised images of any size from one patch on."""
    height, width = (side // self.config.patch_size for side in pixel_values.shape[1:3])
    if not height or not width:
      side = self.config.patch_size
      raise ValueError(f"pixels {pixel_values.shape}, but a patch has {side}")
    head = self.config.hidden_size // self.config.num_attention_heads
    angles = rotary_angles(height, width, head, self.config.rope_theta)
    states = [self.embeddings(pixel_values)]
    for layer in self.layer:
      states.append(layer(states[-1], angles))
    last = self.norm(states[-1])
    return DinoOutput(last, last[:, 0], tuple(states))

  @staticmethod
  def hub_name(name: str) -> str | None:
    """Our name of a tensor in a weight file; transformers 5's module has `model.layer`."""
    return None if name == "embeddings.mask_token" else name.removeprefix("model.")


def rotary_angles(
  height: int, width: int, head: int, theta: float
) -> Float[np.ndarray, "p head"]:
  """By how much each channel of a head is turned, for each patch of a grid, row by row.

  Centres of patches from -1 to 1, times 2 pi, at head / 4 frequencies from 1 down to 1 / theta:
  those of y, of x, and both again for the other half of the channels.
  """
  frequencies = 1 / theta ** np.arange(0, 1, 4 / head, dtype=np.float32)
  centres = [2 * (np.arange(0.5, side, dtype=np.float32) / side) - 1 for side in (height, width)]
  places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
  angles = (2 * math.pi * places * frequencies).reshape(height * width, head // 2)
  return np.tile(angles, 2).astype(np.float32)


def _rotated(
  x: Float[Array, "b s n h"], angles: Float[np.ndarray, "p h"]
) -> Float[Array, "b s n h"]:
  """The last p tokens turned: channel i and i + h / 2 are a pair."""
  before = x.shape[1] - len(angles)
  tokens, patches = x[:, :before], x[:, before:]
  cos, sin = (jnp.asarray(f(angles), x.dtype)[None, :, None] for f in (np.cos, np.sin))
  first, second = jnp.split(patches, 2, axis=-1)
  turned = patches * cos + jnp.concatenate([-second, first], axis=-1) * sin
  return jnp.concatenate([tokens, turned], axis=1)
