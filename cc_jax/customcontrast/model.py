"""CustomContrast: a frozen Stable Diffusion and the adapter that draws a given subject with it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from cc_jax.customcontrast.injection import InjectionConfig, LayerCondition, inject, scale_per_layer
from cc_jax.customcontrast.mfi_encoder import MFIEncoder, MFIEncoderConfig, MFIFeatures
from cc_jax.customcontrast.text_conditioning import check_room, encode_text, per_encoder
from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import clip_pixels


@struct.dataclass
class Conditioning:
  """All that the denoiser needs besides latents and t. A pytree; G groups of layers, L layers."""

  context: tuple[LayerCondition, ...]  # per cross-attention layer
  text: Float[Array, "b t d"] | None  # for addition_embed_type 'text'; None where nothing reads it
  text_embeds: Float[Array, "b e"] | None  # pooled, for SDXL's 'text_time'
  time_ids: Float[Array, "b 6"] | None
  visual_cls: Float[Array, "b d"]
  textual_cls: Float[Array, "b d"]
  textual_tokens: Float[Array, "g b q d"]

  @staticmethod
  def concatenate(parts: Sequence["Conditioning"]) -> "Conditioning":
    """One batch of several conditionings, e.g. with and without image, for guidance."""
    tokens = jnp.concatenate([p.textual_tokens for p in parts], axis=1)  # its axis 0 is the layer
    rest = [p.replace(textual_tokens=None) for p in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rest).replace(textual_tokens=tokens)


@struct.dataclass
class Subject:
  """One more subject of the same prompt, with a noun and a slot of its own, behind the first's."""

  features: Float[Array, "b p c"]  # of `image_features`
  slot: Int[Array, " b"] | Sequence[Int[Array, " b"]]  # one per text encoder where they differ
  noun_span: Int[Array, "b 2"] | Sequence[Int[Array, "b 2"]]
  visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]] | None = None  # of `visual`, if known


class CustomContrast(nnx.Module):
  """Frozen base (image encoder, text encoders, VAE, UNet) and the trainable adapter.

  `base` is a `cc_jax.bases.base.Base`, whose UNet gets its attn2 swapped in place. The model has no
  random state. Under jit: `graphdef, trainable, frozen = nnx.split(model, is_trainable, ...)`.

  Image tokens [R]: each chosen hidden state is normalised per token (mean 0, variance 1, no
  parameters), because CLIP's layers differ in scale by orders of magnitude; then they are
  concatenated along the channels. An encoder's class token stays: it is where CLIP keeps what the
  picture is of. So P = patches + 1. Several references of one subject: concatenate along P.
  """

  def __init__(
    self, base: Any, encoder: MFIEncoderConfig, injection: InjectionConfig, *, dtype=jnp.float32,
    param_dtype=jnp.float32, rngs: nnx.Rngs,
  ):
    """`dtype` computes the adapter, `param_dtype` stores it; the base keeps its own.

    Raises:
      UserError: the base has no image encoder; image_layers or layer_groups do not fit it.
    """
    if base.image_encoder is None:
      raise UserError(
        "this base has no image_encoder/; set config.encoder.image_encoder to the folder of a CLIP "
        "or DINO image encoder"
      )
    kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.dtype = dtype
    self.unet = base.unet
    self.vae = base.vae
    self.text_encoders = nnx.List(base.text_encoders)
    self.force_zeros_for_empty_prompt = base.force_zeros_for_empty_prompt
    self.image_encoder = base.image_encoder
    self.image_processor = nnx.static(FrozenDict(base.image_processor))
    states = base.image_encoder.num_hidden_states
    for layer in encoder.image_layers:
      if not -states <= layer < states:
        raise UserError(
          f"config.encoder.image_layers names hidden state {layer}; the image encoder has "
          f"{states}, 0 (its input) to {states - 1}"
        )
    self.image_layers = encoder.image_layers
    self.image_tokens = base.image_encoder.num_tokens(base.image_processor["size"])
    self.image_width = base.image_encoder.width * len(encoder.image_layers)

    self.layer_paths = tuple(inject(base.unet, injection, visual_width=encoder.width, **kinds))
    self.group_of_layer = encoder.group_of_layer(len(self.layer_paths))
    self.mfi_encoder = MFIEncoder(
      encoder, image_width=self.image_width, layers=len(self.layer_paths),
      text_widths=[tower.config.hidden_size for tower in base.text_encoders], **kinds,
    )

  def image_features(
    self, pixels: Float[Array, "b h w 3"]
  ) -> tuple[Float[Array, "b p c"], Float[Array, "b e"]]:
    """Frozen features of images in [0, 1]: (features [B, P, C], embed [B, E]).

    `embed` is the encoder's embedding of the image, not normalised: the g of MACL's
    S_jk = cos(g(x_j), g(x_k)). Images of another size are resized, both sides alike.
    """
    out = self.image_encoder(clip_pixels(pixels, self.image_processor, square=True))
    states = [_normalise(out.hidden_states[layer]) for layer in self.image_layers]
    return jnp.concatenate(states, axis=-1).astype(self.dtype), out.embedding.astype(jnp.float32)

  def encode(
    self, features: Float[Array, "b p c"] | None, t: Int[Array, " b"],
    use_image: Bool[Array, " b"] | None = None,
    visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]] | None = None,
  ) -> MFIFeatures:
    """The MFI-Encoder alone: what CSCL and MACL need of the frames that nothing is drawn from.

    A dropped image (`use_image` False, or features None for the whole batch) is all zeros.
    `visual`: what `self.visual` said of the same images, if that is known already.
    """
    return self.mfi_encoder(self._kept(features, t.shape[0], use_image), t, visual)

  def visual(
    self, features: Float[Array, "b p c"] | None, use_image: Bool[Array, " b"] | None = None, *,
    batch: int = 1,
  ) -> tuple[Float[Array, "b d"], Float[Array, "b v d"]]:
    """(visual_cls, visual_tokens): the part of `encode` that does not depend on t.

    With features None, the answer to no image, for a batch of that size.
    """
    return self.mfi_encoder.visual(self._kept(features, batch, use_image))

  def _kept(self, features, batch, use_image) -> Float[Array, "b p c"]:
    if features is None:
      return jnp.zeros((batch, self.image_tokens, self.image_width), self.dtype)
    return features if use_image is None else jnp.where(use_image[:, None, None], features, 0)

  def condition(
    self,
    features: Float[Array, "b p c"] | None,
    input_ids: Int[Array, "b *p t"] | Sequence[Int[Array, "b *p t"]],
    slot: Int[Array, " b"] | Sequence[Int[Array, " b"]] | None,
    noun_span: Int[Array, "b 2"] | Sequence[Int[Array, "b 2"]] | None,
    t: Int[Array, " b"],
    *,
    use_image: Bool[Array, " b"] | None = None,
    use_s_plus: Bool[Array, " b"] | bool = True,
    zero_text: Bool[Array, " b"] | bool = False,
    visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]] | None = None,
    encoded: MFIFeatures | None = None,
    scale: Float[Array, "*l_or_b"] | float = 1.0,
    time_ids: Float[Array, "b 6"] | None = None,
    clip_skip: int = 0,
    also: Sequence[Subject] = (),
    toward: tuple[Subject, Float[Array, " b"]] | None = None,
  ) -> Conditioning:
    """Everything that subject and prompt say to the denoiser at timesteps t [B] in [0, 1000).

    Args:
      features: of `image_features`; None = no image (all zeros) and no S+ for the whole batch.
      input_ids: prompt tokens, perhaps in pieces [B, P, T]; slot: token index where S+ goes;
        noun_span: indices [start, end) of the class noun's tokens. Each is one array per text
        encoder, since their tokenizers may pad and split differently; or one array for all.
      use_image: per sample; False zeroes the features and leaves S+ out of that prompt.
      use_s_plus: per sample; the Python value False spares the text encoder the L-fold batch.
      zero_text: per sample; see `encode_text`.
      visual: of `self.visual` for the same features and use_image; computed if None.
      encoded: of `self.encode` in place of features and visual, which are then not read.
      scale: the user's knob: one number, [L], [B], or any of [L, 1], [1, B], [L, B].
      time_ids: SDXL's (original h, w, crop top, left, target h, w).
      clip_skip: how many more layers of the text encoders to leave out at the end.
      also: further subjects, in the order of their slots, all of which count in the prompt as it
        is without any S+. Every subject's words stand after its own noun; the visual attention
        reads the tokens of all, side by side [R].
      toward: another subject and how far to go to it, per sample: 0 = not at all, 1 = that one.
        Its slot and noun are not read: the prompt names one subject.

    Raises:
      UserError: a prompt has no room for S+ (checked outside jit only), or scale has a wrong shape.
    """
    ids = per_encoder(input_ids, len(self.text_encoders))
    if (features is None and encoded is None) or self.mfi_encoder.config.s_plus_space == "none":
      use_s_plus = False
    if use_s_plus is not False:
      check_room(self.text_encoders, ids, (1 + len(also)) * self.mfi_encoder.config.s_words)
    if encoded is None:
      encoded = self.encode(features, t, use_image, visual)
    if toward is not None:
      other, weight = toward
      encoded = encoded.blend(self.encode(other.features, t, use_image, other.visual), weight)
    others = [self.encode(other.features, t, use_image, other.visual) for other in also]
    fused = encoded.fused
    if others:
      fused = jnp.concatenate([fused, *(other.fused for other in others)], axis=2)
    subjects = None
    if use_s_plus is not False:
      said = [(encoded.words, slot, noun_span)]
      said += [(e.words, other.slot, other.noun_span) for e, other in zip(others, also)]
      subjects = [tuple(per_encoder(part, len(ids)) for part in subject) for subject in said]
    use = jnp.broadcast_to(jnp.asarray(use_s_plus), t.shape)
    use = use if use_image is None else use & use_image

    texts, plain, pooled = encode_text(
      self.text_encoders, ids, subjects, use, config=self.mfi_encoder.config,
      addition=self.unet.config.addition_embed_type, clip_skip=clip_skip, zero=zero_text,
    )  # fmt: skip
    scales = scale_per_layer(scale, len(self.group_of_layer), t.shape[0])
    context = tuple(
      # One sequence serves all layers when S+ is shared.
      LayerCondition(texts[min(group, texts.shape[0] - 1)], fused[group], scales[layer])
      for layer, group in enumerate(self.group_of_layer)
    )
    return Conditioning(
      context=context, text=plain, text_embeds=pooled, time_ids=time_ids,
      visual_cls=encoded.visual_cls, textual_cls=encoded.textual_cls,
      textual_tokens=encoded.textual_tokens,
    )

  def predict(
    self, latents: Float[Array, "b h w c"], t: Int[Array, " b"], conditioning: Conditioning, *,
    maps: bool = False,
  ) -> Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], tuple[Float[Array, "b s 1"], ...]]:
    """The UNet's prediction; with `maps` also each layer's location map m [B, HW, 1].

    Maps are sown on request only, and in a copy of the UNet (of its structure; arrays are shared):
    sowing changes the module, which lax.scan forbids for one that was made outside the loop.
    """
    context, unet = conditioning.context, self.unet
    if maps:
      context = tuple(layer.replace(record=True) for layer in context)
      unet = nnx.clone(unet)
    extra = {}
    if conditioning.text_embeds is not None:
      extra = dict(text_embeds=conditioning.text_embeds, time_ids=conditioning.time_ids)
    prediction = unet(latents, t, context, text=conditioning.text, **extra)
    if not maps:
      return prediction
    sown = nnx.pop(unet, nnx.Intermediate)
    by_path = {
      ".".join(map(str, path[:-2])): value.get_value()[-1]
      for path, value in nnx.to_flat_state(sown)
      if path[-1] == "location_map"
    }
    return prediction, tuple(by_path[path] for path in self.layer_paths if path in by_path)


def _normalise(x: Float[Array, "b p c"]) -> Float[Array, "b p c"]:
  """Mean 0 and variance 1 over channels, float32, no parameters."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
