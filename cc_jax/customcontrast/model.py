"""CustomContrast: a frozen Stable Diffusion and the adapter that draws a given subject with it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from cc_jax.customcontrast import s_plus
from cc_jax.customcontrast.injection import InjectionConfig, LayerCondition, inject
from cc_jax.customcontrast.mfi_encoder import MFIEncoder, MFIEncoderConfig, MFIFeatures
from cc_jax.errors import UserError

_TRAINABLE = ("to_k_visual", "to_v_visual", "location", "gate")


def is_trainable(path: Sequence[str | int], value: Any = None) -> bool:
  """Filter for `nnx.split(model, is_trainable, ...)`: the adapter's parameters, no others [P].

  mfi_encoder.* and, in each of the UNet's attn2, to_k_visual, to_v_visual, location and gate.
  """
  if value is not None and not isinstance(value, nnx.Param):
    return False
  if path[0] == "mfi_encoder":
    return True
  names = [part for part in path if isinstance(part, str)]
  return "attn2" in names and any(
    part in _TRAINABLE for part in names[names.index("attn2") + 1 :]
  )


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
  slot: Int[Array, " b"]
  noun_span: Int[Array, "b 2"]
  visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]] | None = None  # of `visual`, if known


class CustomContrast(nnx.Module):
  """Frozen base (image encoder, text encoders, VAE, UNet) and the trainable adapter.

  `base` is a `cc_jax.bases.base.Base`, whose UNet gets its attn2 swapped in place. The model holds no
  random state. Under jit: `graphdef, trainable, frozen = nnx.split(model, is_trainable, ...)`.

  Image tokens [R]: each chosen hidden state is normalised per token (mean 0, variance 1, no
  parameters), because CLIP's layers differ in scale by orders of magnitude; then they are
  concatenated along the channels. The CLS token stays as token 0: it is where CLIP keeps what the
  picture is of. So P = patches + 1. Several references of one subject: concatenate along P.
  """

  def __init__(
    self,
    base: Any,
    encoder: MFIEncoderConfig,
    injection: InjectionConfig,
    *,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """`dtype` computes the adapter, `param_dtype` stores it; the base keeps its own.

    Raises:
      UserError: the base has no image encoder; image_layers or layer_groups do not fit it.
    """
    if base.image_encoder is None:
      raise UserError(
        "this base has no image_encoder/; set config.encoder.image_encoder to the folder of a CLIP "
        "vision model"
      )
    kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.dtype = dtype
    self.unet = base.unet
    self.vae = base.vae
    self.text_encoders = nnx.List(base.text_encoders)
    self.image_encoder = base.image_encoder
    processor = base.image_processor
    self.pixel_mean = tuple(float(v) for v in processor["mean"])
    self.pixel_std = tuple(float(v) for v in processor["std"])

    vision = base.image_encoder.config
    states = vision.num_hidden_layers + 1
    for layer in encoder.image_layers:
      if not -states <= layer < states:
        raise UserError(
          f"config.encoder.image_layers names hidden state {layer}; the image encoder has "
          f"{states}, 0 (its input) to {states - 1}"
        )
    self.image_layers = encoder.image_layers
    self.image_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    self.image_width = vision.hidden_size * len(encoder.image_layers)

    self.layer_paths = tuple(inject(base.unet, injection, visual_width=encoder.width, **kinds))
    self.group_of_layer = encoder.group_of_layer(len(self.layer_paths))
    self.mfi_encoder = MFIEncoder(
      encoder,
      image_width=self.image_width,
      layers=len(self.layer_paths),
      text_widths=[tower.config.hidden_size for tower in base.text_encoders],
      **kinds,
    )

  def image_features(
    self, pixels: Float[Array, "b h w 3"]
  ) -> tuple[Float[Array, "b p c"], Float[Array, "b e"]]:
    """Frozen features of images in [0, 1]: (features [B, P, C], embed [B, E]).

    `embed` is CLIP's image embedding (projected if the tower has a projection), not normalised: the
    g of MACL's S_jk = cos(g(x_j), g(x_k)). Images of another size are resized (cubic, antialiased).
    """
    size = self.image_encoder.config.image_size
    if pixels.shape[1:3] != (size, size):
      shape = (pixels.shape[0], size, size, 3)
      pixels = jnp.clip(jax.image.resize(pixels, shape, "cubic"), 0.0, 1.0)
    pixels = (pixels - jnp.asarray(self.pixel_mean)) / jnp.asarray(self.pixel_std)
    out = self.image_encoder(pixels)
    states = [_normalise(out.hidden_states[layer]) for layer in self.image_layers]
    embed = out.pooled if out.image_embeds is None else out.image_embeds
    return jnp.concatenate(states, axis=-1).astype(self.dtype), embed.astype(jnp.float32)

  def encode(
    self,
    features: Float[Array, "b p c"] | None,
    t: Int[Array, " b"],
    use_image: Bool[Array, " b"] | None = None,
    visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]] | None = None,
  ) -> MFIFeatures:
    """The MFI-Encoder alone: what CSCL and MACL need of the frames that nothing is drawn from.

    A dropped image (`use_image` False, or features None for the whole batch) is all zeros.
    `visual`: what `self.visual` said of the same images, if that is known already.
    """
    return self.mfi_encoder(self._kept(features, t.shape[0], use_image), t, visual)

  def visual(
    self,
    features: Float[Array, "b p c"] | None,
    use_image: Bool[Array, " b"] | None = None,
    *,
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
    input_ids: Int[Array, "b t"] | Sequence[Int[Array, "b t"]],
    slot: Int[Array, " b"] | None,
    noun_span: Int[Array, "b 2"] | None,
    t: Int[Array, " b"],
    *,
    use_image: Bool[Array, " b"] | None = None,
    use_s_plus: Bool[Array, " b"] | bool = True,
    visual: tuple[Float[Array, "b d"], Float[Array, "b v d"]] | None = None,
    scale: Float[Array, "*l_or_b"] | float = 1.0,
    time_ids: Float[Array, "b 6"] | None = None,
    clip_skip: int = 0,
    also: Sequence[Subject] = (),
    toward: tuple[Subject, Float[Array, " b"]] | None = None,
  ) -> Conditioning:
    """Everything that subject and prompt say to the denoiser at timesteps t [B] in [0, 1000).

    Args:
      features: of `image_features`; None = no image (all zeros) and no S+ for the whole batch.
      input_ids: prompt tokens; one array per text encoder where their padding differs.
      slot: token index where S+ goes; noun_span: indices [start, end) of the class noun's tokens.
      use_image: per sample; False zeroes the features and leaves S+ out of that prompt.
      use_s_plus: per sample; the Python value False spares the text encoder the L-fold batch.
      visual: of `self.visual` for the same features and use_image; computed if None.
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
    ids = list(input_ids) if isinstance(input_ids, list | tuple) else [input_ids]
    ids = ids * len(self.text_encoders) if len(ids) == 1 else ids
    if features is None or self.mfi_encoder.config.s_plus_space == "none":
      use_s_plus = False
    if use_s_plus is not False:
      self._check_room(ids, 1 + len(also))
    encoded = self.encode(features, t, use_image, visual)
    if toward is not None:
      other, weight = toward
      encoded = encoded.blend(self.encode(other.features, t, use_image, other.visual), weight)
    others = [self.encode(one.features, t, use_image, one.visual) for one in also]
    fused = encoded.fused
    if others:
      fused = jnp.concatenate([fused, *(other.fused for other in others)], axis=2)
    placed = None  # every subject's words with their slot and noun, the first subject first
    if use_s_plus is not False:
      placed = [(encoded.words, slot, noun_span)]
      placed += [(o.words, one.slot, one.noun_span) for o, one in zip(others, also)]
    use = jnp.broadcast_to(jnp.asarray(use_s_plus), t.shape)
    use = use if use_image is None else use & use_image

    texts, plain, pooled = self._encode_text(ids, placed, use, clip_skip)
    scales = _per_layer(scale, len(self.group_of_layer), t.shape[0])
    context = tuple(
      LayerCondition(
        text=texts[min(group, texts.shape[0] - 1)],  # one sequence serves all when S+ is shared
        visual=fused[group],
        scale=scales[layer],
      )
      for layer, group in enumerate(self.group_of_layer)
    )
    return Conditioning(
      context=context,
      text=plain,
      text_embeds=pooled,
      time_ids=time_ids,
      visual_cls=encoded.visual_cls,
      textual_cls=encoded.textual_cls,
      textual_tokens=encoded.textual_tokens,
    )

  def predict(
    self,
    latents: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    conditioning: Conditioning,
    *,
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

  def _check_room(self, ids, subjects: int) -> None:
    """Raises UserError where S+ would push EOS out; under jit nobody can look: no check there."""
    for tower, ids_BxT in zip(self.text_encoders, ids):
      if not isinstance(ids_BxT, jax.core.Tracer):
        eos = tower.pool_position(ids_BxT)
        if not isinstance(eos, jax.core.Tracer):
          s_plus.check_room(ids_BxT, eos, subjects * self.mfi_encoder.config.s_words)

  def _encode_text(self, ids, placed, use, clip_skip):
    """(texts [S, B, T, D], plain text or None, pooled or None); S = G, or 1 without S+ / shared.

    `placed`: for each subject (words, slot, noun_span), in the order of the slots; None = no S+.
    """
    addition = self.unet.config.addition_embed_type
    config = self.mfi_encoder.config
    pooled_s_plus = config.s_plus_pooled == "s_plus" and placed is not None
    several = len(self.text_encoders) > 1  # SDXL: penultimate states, concatenated; no final norm
    needs_plain = addition is not None and placed is not None and not pooled_s_plus
    all_texts, all_plain, pooled = [], [], None
    for index, (tower, ids_BxT) in enumerate(zip(self.text_encoders, ids)):
      embeddings = tower.token_embedding(ids_BxT)
      sequences, pool_ids = embeddings[None], ids_BxT[None]
      if placed is not None:
        eos, shifted = tower.pool_position(ids_BxT), ids_BxT
        # The last subject first, so that what is inserted moves no slot that is still to be filled.
        for number, (words, slot, noun_span) in enumerate(reversed(placed)):
          w = words[index]
          if config.s_plus_norm == "class_noun":
            w = s_plus.set_norm(w, s_plus.noun_norm(embeddings, noun_span))
          insert = s_plus.insert_more_words if number else s_plus.insert_words
          end = eos + number * w.shape[2]
          sequences = insert(sequences if number else embeddings, w, slot, end, use)
          shifted = s_plus.insert_ids(shifted, w.shape[2], slot, end, use)
        pool_ids = jnp.broadcast_to(shifted, (sequences.shape[0], *shifted.shape))
        if needs_plain:  # the unmodified prompt rides in the same batch
          sequences = jnp.concatenate([sequences, embeddings[None]])
          pool_ids = jnp.concatenate([pool_ids, ids_BxT[None]])
      # Sample by sample, not layer by layer: a batch that is cut over devices then stays cut.
      sequences, pool_ids = jnp.moveaxis(sequences, 0, 1), jnp.moveaxis(pool_ids, 0, 1)
      lead = sequences.shape[:2]
      out = tower(
        inputs_embeds=sequences.reshape(-1, *sequences.shape[2:]),
        pool_ids=pool_ids.reshape(-1, pool_ids.shape[-1]),
      )
      state = tower.context(out, penultimate=several, clip_skip=clip_skip)
      state = jnp.moveaxis(state.reshape(*lead, *state.shape[1:]), 0, 1)
      pools = jnp.moveaxis(out.pooled.reshape(*lead, -1), 0, 1)
      if pooled_s_plus:  # mean over the layers' sequences
        plain, pooled = jnp.mean(state, axis=0), jnp.mean(pools, axis=0)
      else:
        plain, pooled = state[-1], pools[-1]
      all_texts.append(state[:-1] if needs_plain else state)
      all_plain.append(plain)
    texts = jnp.concatenate(all_texts, axis=-1)
    plain = jnp.concatenate(all_plain, axis=-1) if addition == "text" else None
    return texts, plain, pooled if addition == "text_time" else None


def _normalise(x: Float[Array, "b p c"]) -> Float[Array, "b p c"]:
  """Mean 0 and variance 1 over channels, float32, no parameters."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def _per_layer(scale: Any, layers: int, batch: int) -> Float[Array, "l b"]:
  """The user's scale as [L, B]; see `CustomContrast.condition` for what is allowed."""
  given = scale = jnp.asarray(scale, jnp.float32)
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
      f"scale has shape {given.shape}; use one number, {layers} (layers) or {batch} (samples)"
    ) from None
