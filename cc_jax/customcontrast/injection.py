"""Injection: visual cross-attention beside the UNet's frozen text cross-attention, where m says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float

from cc_jax.customcontrast import config_section
from cc_jax.customcontrast.location import TimestepLocation
from cc_jax.errors import UserError
from cc_jax.models.layers import Linear
from cc_jax.models.params import ParamOptions
from cc_jax.models.unet import cross_attention_layers

CHOICES = {"form": ("complementary", "visual_only", "shared")}


@dataclasses.dataclass(frozen=True)
class InjectionConfig:
  """config.injection; configs/subjects3d.py explains each field."""

  form: str = "complementary"
  location: bool = True
  location_width: int = 32
  low_rank: int = 0
  gate_start: float = 0.0

  @classmethod
  def from_config(cls, values: Mapping[str, Any]) -> "InjectionConfig":
    """Reads config.injection (or an adapter file's copy of it) strictly; raises UserError."""
    config = config_section.build(cls, values, section="injection", choices=CHOICES)
    if config.low_rank < 0:
      raise UserError(f"config.injection.low_rank is {config.low_rank}; use 0 for full rank")
    if config.location_width < 1:
      raise UserError(
        f"config.injection.location_width is {config.location_width}; for no map set "
        "config.injection.location=False"
      )
    return config


@struct.dataclass
class LayerCondition:
  """What the cross-attention of one layer receives; the UNet passes it on without looking."""

  text: Float[Array, "b t d"]
  visual: Float[Array, "b k d"]
  scale: Float[Array, " b"]
  record: bool = struct.field(pytree_node=False, default=False)  # sow the location map


def combine(
  form: str, text_out: Float[Array, "b s c"], visual_out: Float[Array, "b s c"],
  m: Float[Array, "b s 1"] | None, gate: Float[Array, ""], scale: Float[Array, " b"],
) -> Float[Array, "b s c"]:
  """The forms of docs/method.md, "Injection"; g = min(scale, 1), a = gate. Factors in float32.

  complementary [R]  (1 - g·a·m)·text + scale·a·m·visual
  visual_only        text + scale·a·m·visual
  shared             (1 + g·(2m - 1))·(text + scale·a·visual)
  m = None (no location) means 1, and in `shared`, whose factor is 1 at the start, a factor of 1.
  """
  gate = gate.astype(jnp.float32)
  scale = scale.astype(jnp.float32)[:, None, None]
  g = jnp.minimum(scale, 1.0)
  if form == "shared":
    factor = 1.0 if m is None else 1.0 + g * (2.0 * m - 1.0)
    on_text, on_visual = factor * jnp.ones_like(g), factor * scale * gate
  else:
    m = 1.0 if m is None else m
    on_text = 1.0 - g * gate * m if form == "complementary" else jnp.ones_like(g)
    on_visual = scale * gate * m
  dtype = text_out.dtype
  return on_text.astype(dtype) * text_out + on_visual.astype(dtype) * visual_out


class LowRank(nnx.Module):
  """x·down·up, biasless; `delta` starts it at zero, for use as a change of a frozen projection."""

  def __init__(self, width: int, out: int, rank: int, *, delta: bool, **kinds):
    init = nnx.initializers.zeros_init() if delta else nnx.initializers.lecun_normal()
    self.down = Linear(width, rank, use_bias=False, **kinds)
    self.up = Linear(rank, out, use_bias=False, kernel_init=init, **kinds)

  def __call__(self, x: Float[Array, "b k d"]) -> Float[Array, "b k c"]:
    return self.up(self.down(x))


class InjectedCrossAttention(nnx.Module):
  """A frozen cross-attention with a trainable visual one beside it, in place of `attn2`.

  W'_k and W'_v start as copies of the frozen W_k and W_v where the adapter's width is the text
  encoder's [P], else from lecun_normal. With low rank r the projection is W_k + down·up (up = 0 at
  the start) or, where widths differ, down·up alone. The gate a starts at 0: at first the layer is
  the frozen one. (IP-Adapter has none: gate_start 1, and train.gate_lr_mult 0 keeps it there.)

  Given anything but a LayerCondition it is the frozen attention. With `record` the map m is sown as
  nnx.Intermediate `location_map` (`location` is the module that makes it).
  """

  trained = {
    "to_k_visual": ParamOptions(),
    "to_v_visual": ParamOptions(),
    "location": ParamOptions(),
    # A gate starts at 0 and Adam moves it by at most the rate a step, while the projections behind
    # it get gradients in proportion to it: at rate 1e-3 the first thousand steps of an adapter
    # would be spent on opening it.
    "gate": ParamOptions(decay=False, rate="gate_lr_mult"),
  }

  def __init__(
    self, attn: nnx.Module, config: InjectionConfig, *, visual_width: int, temb_width: int,
    dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs,
  ):
    kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.attn = attn
    self.form = config.form
    text_width, inner = attn.to_k.kernel.shape
    same = text_width == visual_width
    self.is_delta = config.low_rank > 0 and same

    def projection(frozen: nnx.Linear) -> nnx.Module:
      if config.low_rank:
        return LowRank(visual_width, inner, config.low_rank, delta=same, **kinds)
      init = nnx.initializers.lecun_normal()
      if same:  # a real copy: the frozen array must survive the donation of the trainable one
        def init(key, shape, dtype, out_sharding=None):
          del key, shape, out_sharding
          return jnp.array(frozen.kernel[...], dtype, copy=True)
      return Linear(visual_width, inner, use_bias=False, kernel_init=init, **kinds)

    self.to_k_visual = projection(attn.to_k)
    self.to_v_visual = projection(attn.to_v)
    self.gate = nnx.Param(jnp.full((), config.gate_start, param_dtype))
    if config.location:
      hidden_width = attn.to_q.kernel.shape[0]
      self.location = TimestepLocation(hidden_width, temb_width, config.location_width, **kinds)

  def __call__(
    self, hidden: Float[Array, "b s c"], context: LayerCondition | Float[Array, "b t d"],
    temb: Float[Array, "b e"] | None = None, hw: tuple[int, int] | None = None,
  ) -> Float[Array, "b s c"]:
    """Text and visual attention with the same queries, added before the output projection."""
    if not isinstance(context, LayerCondition):
      return self.attn(hidden, context)
    attn = self.attn
    q = attn.to_q(hidden)
    text_out = attn.attend(q, attn.to_k(context.text), attn.to_v(context.text))
    k, v = self.to_k_visual(context.visual), self.to_v_visual(context.visual)
    if self.is_delta:
      k, v = k + attn.to_k(context.visual), v + attn.to_v(context.visual)
    visual_out = attn.attend(q, k.astype(q.dtype), v.astype(q.dtype))
    m = None
    if hasattr(self, "location"):
      m = self.location(hidden, temb)
      if context.record:
        self.sow(nnx.Intermediate, "location_map", m)
    out = combine(self.form, text_out, visual_out, m, self.gate[...], context.scale)
    return attn.to_out[0](out)


# Attribute of a transformer block -> what `inject` puts in its place.
INJECTED = {"attn2": InjectedCrossAttention}


def inject(
  unet: nnx.Module, config: InjectionConfig, *, visual_width: int, **kinds
) -> list[str]:
  """Swaps attn2 of every transformer block of `unet`, in place.

  Returns:
    The paths of the L blocks in execution order (down, mid, up), from `cross_attention_layers`.
  """
  temb_width = unet.time_embedding.linear_2.kernel.shape[1]
  layers = cross_attention_layers(unet)
  for _, block in layers:
    block.attn2 = InjectedCrossAttention(
      block.attn2, config, visual_width=visual_width, temb_width=temb_width, **kinds
    )
  return [path for path, _ in layers]


def scale_per_layer(scale: Any, layers: int, batch: int) -> Float[Array, "l b"]:
  """The user's scale as [L, B]; see `CustomContrast.condition` for what is allowed."""
  scale = jnp.asarray(scale, jnp.float32)
  shape = scale.shape
  if scale.ndim == 1 and scale.shape[0] > 1:
    if layers == batch == scale.shape[0]:
      raise UserError(
        f"a scale of {layers} numbers could mean layers or samples; give it as [L, 1] or [1, B]"
      )
    scale = scale[:, None] if scale.shape[0] == layers else scale[None]
  try:
    return jnp.broadcast_to(scale, np.broadcast_shapes(scale.shape, (layers, batch)))
  except ValueError:
    raise UserError(
      f"scale has shape {shape}; use one number, {layers} (layers) or {batch} (samples)"
    ) from None
