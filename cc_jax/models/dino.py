"""DINO and DINOv2 image encoders (transformers' modeling_vit.py and modeling_dinov2.py).

One class reads both, e.g. facebook/dino-vits16 and facebook/dinov2-small or -base. Attribute names
are those of the published files, which transformers 5 still writes. For preprocessing see
`cc_jax.models.clip_pixels`; DINOv2's has the size 224 and shortest_edge 256.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.errors import UserError
from cc_jax.models.attention_kernels import WithAttention, dot_product_attention
from cc_jax.models.clip_layers import ACTIVATIONS, checked_config, layer_norm
from cc_jax.models.image_encoder import ImageEncoder

# What the two config classes of transformers do not agree upon.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "ViTModel": dict(model_type="vit", layer_norm_eps=1e-12, patch_size=16),
  "Dinov2Model": dict(model_type="dinov2", layer_norm_eps=1e-6, patch_size=14),
}
# Inside transformers 5 the parts are called otherwise than in its files. ViT's layers are `layers`.
_RENAMED = (
  (r"^layers\.(\d+)\.mlp\.fc1\.", r"layers.\1.intermediate.dense."),
  (r"^layers\.(\d+)\.mlp\.fc2\.", r"layers.\1.output.dense."),
  (r"^layers\.", "encoder.layer."),
  (r"\.attention\.q_proj\.", ".attention.attention.query."),
  (r"\.attention\.k_proj\.", ".attention.attention.key."),
  (r"\.attention\.v_proj\.", ".attention.attention.value."),
  (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
# DINO has no pooler (transformers adds one that nobody trained); the mask is for pretraining.
_NO_PARAMETERS = ("pooler.", "embeddings.mask_token")


@dataclasses.dataclass(frozen=True)
class DinoConfig:
  """The fields of the encoder's `config.json` that matter; defaults are ViT's."""

  architecture: str = "ViTModel"  # or Dinov2Model
  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12
  image_size: int = 224  # for which the positions were trained; others are interpolated
  patch_size: int = 16
  num_channels: int = 3
  qkv_bias: bool = True

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> DinoConfig:
    """Reads a `config.json`.

    Raises:
      UserError: it is of another architecture, or has a value that we do not implement.
    """
    of_type = {default["model_type"]: name for name, default in _DEFAULTS.items()}
    kind = (values.get("architectures") or [of_type.get(values.get("model_type"))])[0]
    if kind not in _DEFAULTS:
      raise UserError(f"DINO config: architectures is {kind!r}; we have {list(_DEFAULTS)}")
    if values.get("use_swiglu_ffn"):
      raise UserError("DINO config: use_swiglu_ffn (DINOv2-giant) is not implemented; use -base")
    values = {**_DEFAULTS[kind], **values, "architecture": kind}
    if kind == "Dinov2Model":  # its files have no intermediate_size
      ratio = values.get("mlp_ratio", 4)
      values["intermediate_size"] = int(values.get("hidden_size", cls.hidden_size) * ratio)
    return checked_config(cls, values, what="DINO config")

  def to_dict(self) -> dict[str, Any]:
    """The fields as transformers writes them into `config.json`."""
    values = dataclasses.asdict(self)
    name = values.pop("architecture")
    values |= {"architectures": [name], "model_type": _DEFAULTS[name]["model_type"]}
    if name == "Dinov2Model":
      ratio = values.pop("intermediate_size") / self.hidden_size
      values |= {"mlp_ratio": int(ratio) if ratio == int(ratio) else ratio, "use_mask_token": False}
    return values


class DinoOutput(NamedTuple):
  """CLS is token 0, then the patches row by row; `hidden_states[0]` is the encoder's input."""

  last_hidden_state: Float[Array, "b s d"]  # after the final norm
  embedding: Float[Array, "b d"]  # its CLS, by which DINO compares images
  hidden_states: tuple[Float[Array, "b s d"], ...]  # before the final norm


class PatchEmbeddings(nnx.Module):
  """A linear map of each patch; pixels beyond the last whole patch are left out."""

  def __init__(self, config: DinoConfig, **kw):
    window = dict(kernel_size=(config.patch_size,) * 2, strides=config.patch_size, padding="VALID")
    self.projection = nnx.Conv(config.num_channels, config.hidden_size, **window, **kw)

  def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    return self.projection(pixels)


class DinoEmbeddings(nnx.Module):
  """Patches, the class token and positions."""

  def __init__(self, config: DinoConfig, *, param_dtype, rngs, **kw):
    def table(rows: int) -> nnx.Param:
      noise = jax.random.normal(rngs.params(), (1, rows, config.hidden_size), param_dtype)
      return nnx.Param(0.02 * noise)

    self.side = config.image_size // config.patch_size
    self.cls_token = table(1)
    self.position_embeddings = table(1 + self.side**2)
    self.patch_embeddings = PatchEmbeddings(config, param_dtype=param_dtype, rngs=rngs, **kw)

  def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b s d"]:
    patches = self.patch_embeddings(pixels)
    batch, height, width, channels = patches.shape
    cls = jnp.broadcast_to(self.cls_token[...].astype(patches.dtype), (batch, 1, channels))
    tokens = jnp.concatenate([cls, patches.reshape(batch, -1, channels)], axis=1)
    return tokens + self._positions(height, width).astype(patches.dtype)

  def _positions(self, height: int, width: int) -> Float[Array, "1 s d"]:
    """The table, resized to a grid of [height, width] patches by bicubic interpolation."""
    table = self.position_embeddings[...]
    if (height, width) == (self.side, self.side):
      return table
    grid = table[0, 1:].reshape(self.side, self.side, -1).astype(jnp.float32)
    rows, columns = _bicubic(self.side, height), _bicubic(self.side, width)
    grid = jnp.einsum("yi,xj,ijd->yxd", rows, columns, grid)
    return jnp.concatenate([table[:, :1], grid.reshape(1, height * width, -1)], axis=1)


class SelfAttention(WithAttention):
  """Queries, keys and values of all heads, and the attention proper."""

  def __init__(self, config: DinoConfig, **kw):
    self.heads = config.num_attention_heads
    for name in ("query", "key", "value"):
      width = config.hidden_size
      setattr(self, name, nnx.Linear(width, width, use_bias=config.qkv_bias, **kw))

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
    q, k, v = (part(x).reshape(split) for part in (self.query, self.key, self.value))
    return dot_product_attention(q, k, v, self.kernels).reshape(x.shape)


class Dense(nnx.Module):
  """A linear layer that the files call `dense`."""

  def __init__(self, inputs: int, outputs: int, **kw):
    self.dense = nnx.Linear(inputs, outputs, **kw)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s e"]:
    return self.dense(x)


class DinoAttention(nnx.Module):
  """Multi-head self-attention with its output projection."""

  def __init__(self, config: DinoConfig, **kw):
    self.attention = SelfAttention(config, **kw)
    self.output = Dense(config.hidden_size, config.hidden_size, **kw)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    return self.output(self.attention(x))


class ViTLayer(nnx.Module):
  """Pre-norm attention and MLP, each with a residual."""

  def __init__(self, config: DinoConfig, **kw):
    width, eps = config.hidden_size, config.layer_norm_eps
    self.activation = config.hidden_act
    self.layernorm_before = layer_norm(width, eps, **kw)
    self.attention = DinoAttention(config, **kw)
    self.layernorm_after = layer_norm(width, eps, **kw)
    self.intermediate = Dense(width, config.intermediate_size, **kw)
    self.output = Dense(config.intermediate_size, width, **kw)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    x = x + self.attention(self.layernorm_before(x))
    h = ACTIVATIONS[self.activation](self.intermediate(self.layernorm_after(x)))
    return x + self.output(h)


class Dinov2MLP(nnx.Module):
  """fc1, activation, fc2."""

  def __init__(self, config: DinoConfig, **kw):
    self.activation = config.hidden_act
    self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, **kw)
    self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, **kw)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class LayerScale(nnx.Module):
  """A learnt factor per channel."""

  def __init__(self, width: int, param_dtype):
    self.lambda1 = nnx.Param(jnp.ones(width, param_dtype))

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    return x * self.lambda1[...].astype(x.dtype)


class Dinov2Layer(nnx.Module):
  """ViT's layer with a learnt scale on both of its branches, and other names."""

  def __init__(self, config: DinoConfig, *, param_dtype, **kw):
    width, eps = config.hidden_size, config.layer_norm_eps
    kw = dict(param_dtype=param_dtype, **kw)
    self.norm1 = layer_norm(width, eps, **kw)
    self.attention = DinoAttention(config, **kw)
    self.layer_scale1 = LayerScale(width, param_dtype)
    self.norm2 = layer_norm(width, eps, **kw)
    self.mlp = Dinov2MLP(config, **kw)
    self.layer_scale2 = LayerScale(width, param_dtype)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    x = x + self.layer_scale1(self.attention(self.norm1(x)))
    return x + self.layer_scale2(self.mlp(self.norm2(x)))


class DinoEncoder(nnx.Module):
  """The layers in a row; returns their input and every output: num_hidden_layers + 1 states."""

  def __init__(self, config: DinoConfig, **kw):
    layer = {"ViTModel": ViTLayer, "Dinov2Model": Dinov2Layer}[config.architecture]
    self.layer = nnx.List(layer(config, **kw) for _ in range(config.num_hidden_layers))

  def __call__(self, x: Float[Array, "b s d"]) -> tuple[Float[Array, "b s d"], ...]:
    states = [x]
    for layer in self.layer:
      states.append(layer(states[-1]))
    return tuple(states)


class Dino(ImageEncoder):
  """The image encoder of DINO or DINOv2, as `config.architecture` says."""

  normalisation = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # ImageNet's
  model_types = ("vit", "dinov2")
  any_size = True

  def __init__(
    self, config: DinoConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.embeddings = DinoEmbeddings(config, **kw)
    self.encoder = DinoEncoder(config, **kw)
    self.layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)

  def __call__(self, pixel_values: Float[Array, "b h w c"]) -> DinoOutput:
    """Encodes normalised images of any size from one patch on."""
    if min(pixel_values.shape[1:3]) < self.config.patch_size:
      raise ValueError(f"pixels {pixel_values.shape}, but a patch has {self.config.patch_size}")
    states = self.encoder(self.embeddings(pixel_values))
    last = self.layernorm(states[-1])
    return DinoOutput(last, last[:, 0], states)

  @staticmethod
  def hub_name(name: str) -> str | None:
    """Our name of a tensor in a weight file, or of a parameter of transformers 5's module."""
    if name.startswith(_NO_PARAMETERS):
      return None
    for pattern, ours in _RENAMED:
      name = re.sub(pattern, ours, name)
    return name


def _bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """The matrix that resizes one side as torch.nn.functional.interpolate(mode='bicubic') does.

  Keys' kernel with a = -0.75 (jax.image.resize has -0.5), no antialiasing, edges repeated, pixel
  centres at halves (align_corners=False).
  """
  a = -0.75
  centre = (np.arange(new) + 0.5) * old / new - 0.5
  matrix = np.zeros((new, old))
  for tap in range(-1, 3):
    index = np.floor(centre) + tap
    x = np.abs(centre - index)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    rows, columns = np.arange(new), np.clip(index, 0, old - 1).astype(int)
    np.add.at(matrix, (rows, columns), np.where(x <= 1, near, far))
  return matrix.astype(np.float32)
