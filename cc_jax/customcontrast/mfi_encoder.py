"""The MFI-Encoder (Multimodal Feature Injection): one subject's image features in, tokens out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cc_jax.customcontrast import config_section
from cc_jax.customcontrast.qformer import TextualQformer, VisualQformer
from cc_jax.customcontrast.tv_fusion import TVFusion
from cc_jax.errors import UserError
from cc_jax.models.layers import Linear
from cc_jax.models.params import ParamOptions

CHOICES = {
  "timestep_layer": ("fourier_mlp", "none"),
  "textual_cls": ("mean", "last"),
  "s_plus_space": ("per_layer", "shared", "none"),
  "s_plus_norm": ("class_noun", "free"),
  "s_plus_pooled": ("plain", "s_plus"),
  "fusion": ("tv_fusion", "visual_tokens"),
}


@dataclasses.dataclass(frozen=True)
class MFIEncoderConfig:
  """config.encoder. Every choice is an [R] of docs/method.md; see also configs/subjects3d.py."""

  image_layers: tuple
  width: int
  depth: int
  heads: int
  visual_queries: int
  textual_queries: int
  s_words: int
  image_encoder: str = ""  # read by whoever loads the base; the networks do not need it
  timestep_layer: str = "fourier_mlp"
  textual_cls: str = "mean"
  s_plus_space: str = "per_layer"
  s_plus_norm: str = "class_noun"
  s_plus_pooled: str = "plain"
  fusion: str = "tv_fusion"
  layer_groups: tuple = ()
  contrast_head: int = 0

  @classmethod
  def from_config(cls, values: Mapping[str, Any]) -> "MFIEncoderConfig":
    """Reads config.encoder (or an adapter file's copy of it) strictly; raises UserError."""
    config = config_section.build(cls, values, section="encoder", choices=CHOICES)
    for name in ("width", "depth", "heads", "visual_queries", "textual_queries", "s_words"):
      if getattr(config, name) < 1:
        raise UserError(f"config.encoder.{name} is {getattr(config, name)}; it must be at least 1")
    if config.width % config.heads:
      raise UserError(
        f"config.encoder.width {config.width} is no multiple of config.encoder.heads {config.heads}"
      )
    if config.s_words > config.textual_queries:
      raise UserError(
        f"config.encoder.s_words is {config.s_words}, but there are only {config.textual_queries} "
        "textual queries to take them from; raise config.encoder.textual_queries"
      )
    if config.contrast_head < 0:
      raise UserError(
        f"config.encoder.contrast_head is {config.contrast_head}; use 0 for no projection head"
      )
    if not config.image_layers:
      raise UserError("config.encoder.image_layers is empty; name at least one hidden state")
    return config

  def group_of_layer(self, layers: int) -> tuple[int, ...]:
    """For each of the UNet's L cross-attention layers, the group whose tokens it gets.

    Raises:
      UserError: the sizes in layer_groups do not add up to L.
    """
    if not self.layer_groups:
      return tuple(range(layers))
    if sum(self.layer_groups) != layers or min(self.layer_groups) < 1:
      raise UserError(
        f"config.encoder.layer_groups {self.layer_groups} must be positive sizes that add up to "
        f"the UNet's {layers} cross-attention layers; use () for a group per layer"
      )
    return tuple(group for group, size in enumerate(self.layer_groups) for _ in range(size))


class MFIFeatures(NamedTuple):
  """Everything the encoder says about a batch of images. G groups of layers (G = L by default)."""

  visual_cls: Float[Array, "b d"]
  visual_tokens: Float[Array, "b v d"]
  textual_cls: Float[Array, "b d"]
  textual_tokens: Float[Array, "g b q d"]  # what MACL compares: behind the head, if there is one
  fused: Float[Array, "g b k d"]  # what the visual cross-attention reads; K = Q (V if unfused)
  words: tuple[Float[Array, "s b w e"], ...]  # S+ per text encoder; S = G (1 if shared)

  def blend(self, other: "MFIFeatures", weight: Float[Array, " b"]) -> "MFIFeatures":
    """From this subject (weight 0) to another (1), in everything that a drawing reads."""

    def mixed(axis: int, a, b):
      w = _along(axis, weight.astype(a.dtype), a)
      return (1 - w) * a + w * b

    return self.map_batch(mixed, other)

  def where(self, condition: Bool[Array, " b"], other: "MFIFeatures") -> "MFIFeatures":
    """These features where the condition holds, the other's elsewhere."""
    pick = lambda axis, a, b: jnp.where(_along(axis, condition, a), a, b)  # noqa: E731
    return self.map_batch(pick, other)

  def map_batch(self, function: Callable[..., Array], *others: "MFIFeatures") -> "MFIFeatures":
    """function(batch axis, array, the others' arrays) of every array."""
    parts = {
      name: jax.tree.map(functools.partial(function, int(name in _LAYERS_FIRST)), *values)
      for name, values in zip(self._fields, zip(self, *others))
    }
    return MFIFeatures(**parts)


_LAYERS_FIRST = ("textual_tokens", "fused", "words")  # the batch is their second axis


def _along(axis: int, values: Array, like: Array) -> Array:
  """[B] -> the shape that broadcasts over `like`, whose axis `axis` is the batch."""
  return values.reshape([-1 if i == axis else 1 for i in range(like.ndim)])


class MFIEncoder(nnx.Module):
  """Both Q-Formers, TV Fusion, and a linear head to the words of each text encoder."""

  trained = ParamOptions()  # every parameter

  def __init__(
    self, config: MFIEncoderConfig, *, image_width: int, layers: int, text_widths: Sequence[int],
    **kinds,
  ):
    """`image_width` = C of the features, `layers` = L of the UNet, `text_widths` per encoder."""
    sizes = dict(depth=config.depth, heads=config.heads)
    self.config = config
    self.visual = VisualQformer(
      image_width, config.width, queries=config.visual_queries, **sizes, **kinds
    )
    self.textual = TextualQformer(
      image_width, config.width, queries=config.textual_queries,
      layers=max(config.group_of_layer(layers)) + 1, timestep_layer=config.timestep_layer,
      cls_from=config.textual_cls, **sizes, **kinds,
    )
    if config.fusion == "tv_fusion":
      self.fusion = TVFusion(config.width, **kinds)
    self.heads = nnx.List([Linear(config.width, width, **kinds) for width in text_widths])
    if config.contrast_head:  # [R] as in SimCLR; the lab's variant, since it can hide pose
      self.contrast_in = Linear(config.width, config.contrast_head, **kinds)
      self.contrast_out = Linear(config.contrast_head, config.width, **kinds)

  def __call__(
    self, features: Float[Array, "b p c"], t: Int[Array, " b"],
    visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]] | None = None,
  ) -> MFIFeatures:
    """Encodes image features at timesteps t [B] in [0, 1000).

    `visual` is what `self.visual(features)` returned before: it does not depend on t, so that one
    call serves a whole denoising trajectory.
    """
    visual = self.visual(features) if visual is None else visual
    return self.combine(visual, self.textual(features, t))

  def combine(
    self, visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]],
    textual: tuple[Float[Array, "b d"], Float[Array, "g b q d"]],
  ) -> MFIFeatures:
    """What follows from the answers of both Q-Formers for the same images."""
    (visual_cls, visual), (textual_cls, textual) = visual, textual
    if self.config.fusion == "tv_fusion":
      fused = self.fusion(textual, visual)
    else:  # the lab's control: each layer sees all visual tokens
      fused = jnp.broadcast_to(visual, (textual.shape[0], *visual.shape))
    words = textual[:, :, : self.config.s_words]  # [R] the first W tokens are the pseudo-words
    if self.config.s_plus_space == "shared":
      words = jnp.mean(words, axis=0, keepdims=True)
    words = tuple(_by_image(head, words) for head in self.heads)
    return MFIFeatures(visual_cls, visual, textual_cls, self.compared(textual), fused, words)

  def compared(self, textual: Float[Array, "g b q d"]) -> Float[Array, "g b q d"]:
    """The textual Q-Former's tokens as MACL compares them: behind the head, if there is one."""
    if not self.config.contrast_head:
      return textual
    return _by_image(lambda x: self.contrast_out(jax.nn.gelu(self.contrast_in(x))), textual)


def _by_image(
  function: Callable[[Array], Array], x: Float[Array, "l b q d"]
) -> Float[Array, "l b q e"]:
  """function(x), which sees the batch as the first axis: see `Linear`."""
  return jnp.moveaxis(function(jnp.moveaxis(x, 0, 1)), 0, 1)
