"""The transformer that CLIP's text and vision towers share (transformers' modeling_clip.py).

Attribute names are PyTorch's module names, so a weight's path is its key in the weight file.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from cc_jax.errors import UserError
from cc_jax.models.attention_kernels import WithAttention, dot_product_attention
from cc_jax.models.remat import rematerialised

# OpenAI's models were trained with quick_gelu, LAION's with the exact gelu.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,  # DINOv3's gated models
}

_TOWER_CHILDREN = (
  "embeddings", "encoder", "pre_layrnorm", "final_layer_norm", "post_layernorm"
)
_Config = TypeVar("_Config")


def config_from_dict(
  cls: type[_Config], values: Mapping[str, Any], *, architectures: Mapping[str, bool]
) -> _Config:
  """Builds the dataclass of a CLIP tower from a transformers `config.json`.

  Keys that the dataclass lacks are ignored: old files carry every generation default of their day.
  `architectures` maps the class names we implement to whether that class has a projection.

  Raises:
    UserError: a value has the wrong type or is one that we do not implement.
  """
  names = values.get("architectures") or [next(iter(architectures))]
  if len(names) != 1 or names[0] not in architectures:
    raise UserError(f"CLIP config: architectures is {names}; we implement {list(architectures)}")
  values = {**values, "with_projection": architectures[names[0]]}
  return checked_config(cls, values, what="CLIP config")


def checked_config(cls: type[_Config], values: Mapping[str, Any], *, what: str) -> _Config:
  """Builds the dataclass of a transformer from those of `values` that it has fields for.

  Raises:
    UserError: a value has the wrong type, or the transformer cannot be built; `what` begins it.
  """
  taken: dict[str, Any] = {}
  for field in dataclasses.fields(cls):
    if field.name not in values or values[field.name] is None:
      continue
    value, kind = values[field.name], type(field.default)
    if type(value) is not kind and not (kind is float and type(value) is int):
      raise UserError(f"{what}: {field.name} is {value!r}, but must be of type {kind.__name__}")
    taken[field.name] = value
  config = cls(**taken)
  if config.hidden_act not in ACTIVATIONS:
    raise UserError(
      f"{what}: hidden_act {config.hidden_act!r} is unknown; we have {list(ACTIVATIONS)}"
    )
  if config.hidden_size % config.num_attention_heads:
    raise UserError(
      f"{what}: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
      f"{config.num_attention_heads}"
    )
  return config


def config_to_dict(config: Any, *, model_type: str, architectures: Mapping[str, bool]) -> dict:
  """The inverse of `config_from_dict`: what transformers would write."""
  values = dataclasses.asdict(config)
  projection = values.pop("with_projection")
  name = next(name for name, has in architectures.items() if has == projection)
  # transformers loads in this type where it is not told another. Left out, it would take the stored
  # one, diffusers float32, and a pipeline from float16 files would stop at its first product.
  return {"architectures": [name], "model_type": model_type, "dtype": "float32", **values}


class CLIPAttention(WithAttention):
  """Multi-head self-attention; scores and softmax in float32."""

  def __init__(self, width: int, heads: int, **kwargs):
    self.heads = heads
    self.k_proj = nnx.Linear(width, width, **kwargs)
    self.v_proj = nnx.Linear(width, width, **kwargs)
    self.q_proj = nnx.Linear(width, width, **kwargs)
    self.out_proj = nnx.Linear(width, width, **kwargs)

  def __call__(self, x: Float[Array, "b s d"], *, causal: bool) -> Float[Array, "b s d"]:
    split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
    q, k, v = (proj(x).reshape(split) for proj in (self.q_proj, self.k_proj, self.v_proj))
    out = dot_product_attention(q, k, v, self.kernels, causal=causal)
    return self.out_proj(out.reshape(x.shape))


class CLIPMLP(nnx.Module):
  """fc1, activation, fc2."""

  def __init__(self, width: int, hidden: int, activation: str, **kwargs):
    self.activation = activation
    self.fc1 = nnx.Linear(width, hidden, **kwargs)
    self.fc2 = nnx.Linear(hidden, width, **kwargs)

  def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
  """Pre-norm attention and MLP, each with a residual."""

  def __init__(self, config, *, dtype, param_dtype, rngs: nnx.Rngs):
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    width = config.hidden_size
    self.self_attn = CLIPAttention(width, config.num_attention_heads, **kwargs)
    self.layer_norm1 = layer_norm(width, config.layer_norm_eps, **kwargs)
    self.mlp = CLIPMLP(width, config.intermediate_size, config.hidden_act, **kwargs)
    self.layer_norm2 = layer_norm(width, config.layer_norm_eps, **kwargs)

  def __call__(self, x: Float[Array, "b s d"], *, causal: bool) -> Float[Array, "b s d"]:
    x = x + self.self_attn(self.layer_norm1(x), causal=causal)
    return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
  """The layers in a row; returns their input and every output: num_hidden_layers + 1 states."""

  remat = "none"  # of each layer; see models/remat.py

  def __init__(self, config, *, dtype, param_dtype, rngs: nnx.Rngs):
    self.layers = nnx.List([
      CLIPEncoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
      for _ in range(config.num_hidden_layers)
    ])

  def __call__(
    self, x: Float[Array, "b s d"], *, causal: bool = False
  ) -> tuple[Float[Array, "b s d"], ...]:
    """`causal`: a token sees none after it."""
    states = [x]
    for layer in self.layers:
      run = functools.partial(layer, causal=causal)
      states.append(rematerialised(self.remat, run)(states[-1]))
    return tuple(states)


def layer_norm(width: int, eps: float, **kwargs) -> nnx.LayerNorm:
  """Statistics in float32; the two-pass variance, because E[x²] - E[x]² cancels."""
  return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, **kwargs)


def embedding(rows: int, width: int, **kwargs) -> nnx.Embed:
  """A table drawn with CLIP's standard deviation of 0.02."""
  return nnx.Embed(rows, width, embedding_init=jax.nn.initializers.normal(0.02), **kwargs)


def tower_name(name: str, tower: str) -> str | None:
  """A stored tensor's name with the tower's prefix, which some versions of transformers drop.

  None for `position_ids`, a buffer (0, 1, 2, ...) that older versions stored.
  """
  if name.endswith(".position_ids"):
    return None
  return f"{tower}.{name}" if name.split(".")[0] in _TOWER_CHILDREN else name
