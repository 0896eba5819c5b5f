"""CLIP's text tower, with or without projection (transformers' modeling_clip.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cc_jax.errors import UserError
from cc_jax.models.clip_layers import (
  CLIPEncoder,
  config_from_dict,
  config_to_dict,
  embedding,
  layer_norm,
  tower_name,
)

# Class names in config.json, and whether they have a projection.
_ARCHITECTURES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """The fields of a text tower's `config.json` that matter; defaults are transformers'."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  pad_token_id: int = 1
  bos_token_id: int = 49406
  eos_token_id: int = 49407
  with_projection: bool = False

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
    """Reads a `config.json`; raises UserError for a value that we do not implement."""
    return config_from_dict(cls, values, architectures=_ARCHITECTURES)

  def to_dict(self) -> dict[str, Any]:
    """The fields as transformers writes them into `config.json`."""
    return config_to_dict(self, model_type="clip_text_model", architectures=_ARCHITECTURES)


class CLIPTextOutput(NamedTuple):
  """`hidden_states` are the encoder's input and each layer's output, before the final norm."""

  last_hidden_state: Float[Array, "b t d"]  # after the final norm
  pooled: Float[Array, "b e"]  # at EOS; through text_projection if the model has one
  hidden_states: tuple[Float[Array, "b t d"], ...]


class CLIPTextEmbeddings(nnx.Module):
  """Token and position tables."""

  def __init__(self, config: CLIPTextConfig, **kwargs):
    self.token_embedding = embedding(config.vocab_size, config.hidden_size, **kwargs)
    self.position_embedding = embedding(
      config.max_position_embeddings, config.hidden_size, **kwargs
    )

  def __call__(self, inputs_embeds: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    length, limit = inputs_embeds.shape[1], self.position_embedding.num_embeddings
    if length > limit:
      raise ValueError(f"{length} tokens, but the text encoder has {limit} positions")
    return inputs_embeds + self.position_embedding(jnp.arange(length))


class CLIPTextTransformer(nnx.Module):
  """What transformers calls `text_model`."""

  def __init__(self, config: CLIPTextConfig, **kwargs):
    self.embeddings = CLIPTextEmbeddings(config, **kwargs)
    self.encoder = CLIPEncoder(config, **kwargs)
    self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, **kwargs)


class CLIPTextModel(nnx.Module):
  """The text encoder of Stable Diffusion; causal attention, padding counts."""

  def __init__(
    self, config: CLIPTextConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
  ):
    kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.config = config
    self.dtype = dtype
    self.text_model = CLIPTextTransformer(config, **kwargs)
    if config.with_projection:
      self.text_projection = nnx.Linear(
        config.hidden_size, config.projection_dim, use_bias=False, **kwargs
      )

  @property
  def token_embedding(self) -> nnx.Embed:
    return self.text_model.embeddings.token_embedding

  def __call__(
    self, input_ids: Int[Array, "b t"] | None = None,
    inputs_embeds: Float[Array, "b t d"] | None = None, *,
    pool_ids: Int[Array, "b t"] | None = None,
  ) -> CLIPTextOutput:
    """Encodes token ids, or embeddings to which positions have not been added yet.

    Args:
      input_ids: padded to any length up to max_position_embeddings.
      inputs_embeds: instead of ids; `pool_ids` must then say which position is EOS.
      pool_ids: the ids in which EOS is looked for; default `input_ids`.
    """
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("give either input_ids or inputs_embeds")
    pool_ids = input_ids if pool_ids is None else pool_ids
    if pool_ids is None:
      raise ValueError("inputs_embeds need pool_ids to know where EOS is")
    if inputs_embeds is None:
      inputs_embeds = self.token_embedding(input_ids)
    x = self.text_model.embeddings(jnp.asarray(inputs_embeds, self.dtype))
    states = self.text_model.encoder(x, causal=True)
    last = self.text_model.final_layer_norm(states[-1])
    pooled = jnp.take_along_axis(last, self.pool_position(pool_ids)[:, None, None], axis=1)[:, 0]
    if self.config.with_projection:
      pooled = self.text_projection(pooled)
    return CLIPTextOutput(last, pooled, states)

  def context(
    self, output: CLIPTextOutput, *, penultimate: bool = False, clip_skip: int = 0
  ) -> Float[Array, "b t d"]:
    """The text as cross-attention sees it (diffusers: `encode_prompt` of the two pipelines).

    Args:
      output: of this model.
      penultimate: SDXL's way, the input of the last layer, without the final norm. Otherwise the
        last layer's output, with it.
      clip_skip: how many more layers to leave out at the end.

    Raises:
      UserError: there are not so many layers.
    """
    layers = len(output.hidden_states) - 1
    if not 0 <= clip_skip <= layers - penultimate:
      raise UserError(
        f"clip_skip is {clip_skip} and the text encoder has {layers} layers; use 0 to "
        f"{layers - penultimate}"
      )
    state = output.hidden_states[-1 - penultimate - clip_skip]
    return state if penultimate else self.text_model.final_layer_norm(state)

  @staticmethod
  def hub_name(name: str) -> str | None:
    """Our name of a tensor in a weight file; transformers 5 leaves the `text_model.` out."""
    return tower_name(name, "text_model")

  def pool_position(self, ids: Int[Array, "b t"]) -> Int[Array, " b"]:
    """Where the sentence is read off.

    Configs from before transformers' PR 24773 say eos_token_id 2, which is not what their tokenizer
    writes: there the highest id is EOS. Otherwise the first EOS counts; it may also be the padding.
    """
    eos = self.config.eos_token_id
    return jnp.argmax(ids if eos == 2 else ids == eos, axis=1)
