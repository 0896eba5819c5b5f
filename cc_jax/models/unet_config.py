"""The UNet's config.json, as far as it is implemented; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cc_jax.errors import UserError

_DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

# Fields of diffusers' UNet2DConditionModel of which we implement these values only. None in a file
# means that the writer left the field out, but for _NOT_NONE, where it takes a part away.
_ONLY = {
  "act_fn": ("silu", "swish"),
  "attention_type": ("default",),
  "center_input_sample": (False,),
  "class_embed_type": (None,),
  "class_embeddings_concat": (False,),
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "cross_attention_norm": (None,),
  "downsample_padding": (1,),
  "dropout": (0,),
  "dual_cross_attention": (False,),
  "encoder_hid_dim": (None,),
  "encoder_hid_dim_type": (None,),
  "mid_block_only_cross_attention": (False,),
  "mid_block_scale_factor": (1,),
  "mid_block_type": ("UNetMidBlock2DCrossAttn",),
  "num_attention_heads": (None,),
  "num_class_embeds": (None,),
  "only_cross_attention": (False,),
  "resnet_out_scale_factor": (1,),
  "resnet_skip_time_act": (False,),
  "resnet_time_scale_shift": ("default",),
  "reverse_transformer_layers_per_block": (None,),
  "time_cond_proj_dim": (None,),
  "time_embedding_act_fn": (None,),
  "time_embedding_type": ("positional",),
  "timestep_post_act": (None,),
}

_NOT_NONE = ("mid_block_type", "norm_num_groups")
# Fields that a file may have one number of for all blocks.
PER_BLOCK = (
  "layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"
)  # fmt: skip


@dataclass(frozen=True)
class UNetConfig:
  """Fields and defaults of diffusers' `UNet2DConditionModel`; numbers per block are tuples here.

  `attention_head_dim` is the number of heads (a historic misnomer that the files keep).
  """

  sample_size: int | tuple[int, int] | None = None
  in_channels: int = 4
  out_channels: int = 4
  flip_sin_to_cos: bool = True
  freq_shift: float = 0
  down_block_types: tuple[str, ...] = (
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "DownBlock2D",
  )
  up_block_types: tuple[str, ...] = (
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D",
  )
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: tuple[int, ...] = (2,)
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: tuple[int, ...] = (1280,)
  transformer_layers_per_block: tuple[int, ...] = (1,)
  attention_head_dim: tuple[int, ...] = (8,)
  use_linear_projection: bool = False
  upcast_attention: bool = False  # ours always accumulates scores and softmax in float32
  addition_embed_type: str | None = None
  addition_embed_type_num_heads: int = 64
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None
  time_embedding_dim: int | None = None

  def __post_init__(self):
    blocks = len(self.block_out_channels)
    for name in PER_BLOCK:
      value = getattr(self, name)
      value = (value,) if isinstance(value, int) else tuple(value)
      object.__setattr__(self, name, value * blocks if len(value) == 1 else value)
    self._check(blocks)

  def _check(self, blocks: int) -> None:
    for name in ("down_block_types", "up_block_types", *PER_BLOCK):
      value = getattr(self, name)
      if len(value) != blocks:
        raise UserError(
          f"UNet config: {name}={value} must have one entry for each of the {blocks} blocks"
          " in block_out_channels"
        )
      if name.endswith(("dim", "block")) and not all(isinstance(n, int) for n in value):
        raise UserError(f"UNet config: {name}={value} is not implemented; use whole numbers")
    for name, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
      for block_type in getattr(self, name):
        if block_type not in known:
          raise UserError(
            f"UNet config: {name} has {block_type!r}; implemented are {', '.join(known)}"
          )
    for channels, heads in zip(self.block_out_channels, self.attention_head_dim):
      if channels % self.norm_num_groups or channels % heads:
        raise UserError(
          f"UNet config: block_out_channels has {channels}, which must be divisible by"
          f" norm_num_groups={self.norm_num_groups} and by its number of heads {heads}"
        )
    self._check_addition()

  def _check_addition(self) -> None:
    kind = self.addition_embed_type
    if kind not in (None, "text", "text_time"):
      raise UserError(
        f"UNet config: addition_embed_type={kind!r} is not implemented; None, 'text' and"
        " 'text_time' are"
      )
    if kind == "text" and self.cross_attention_dim[0] % self.addition_embed_type_num_heads:
      raise UserError(
        f"UNet config: addition_embed_type_num_heads={self.addition_embed_type_num_heads} must"
        f" divide cross_attention_dim={self.cross_attention_dim[0]}"
      )
    if kind == "text_time":
      for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if getattr(self, name) is None:
          raise UserError(f"UNet config: addition_embed_type='text_time' needs {name}")

  @property
  def time_embed_dim(self) -> int:
    """E: the width of the time embedding that every resnet and every `attn2` receives."""
    return self.time_embedding_dim or 4 * self.block_out_channels[0]

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
    """Reads a config.json.

    Raises:
      UserError: a field is unknown, or has a value that is not implemented.
    """
    ours = {field.name for field in fields(cls)}
    kept = {}
    for name, value in values.items():
      if name.startswith("_") or (value is None and name not in _NOT_NONE):
        continue
      if name not in ours and name not in _ONLY:
        raise UserError(f"UNet config: unknown field {name}={value!r}; remove it if it is unused")
      if name in ours and value is not None:
        kept[name] = tuple(value) if isinstance(value, list) else value
      elif value not in _ONLY.get(name, ()):
        allowed = " or ".join(map(repr, _ONLY.get(name, ()))) or "a number"
        raise UserError(f"UNet config: {name}={value!r} is not implemented, only {allowed} is")
    return cls(**kept)
