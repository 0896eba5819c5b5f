"""Pretraining of the mini CLIP pair."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from cc_jax.bases.base import load_base
from cc_jax.bases.save import save_module
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.lab import judge
from cc_jax.models.clip_pixels import CLIP_PROCESSOR, clip_pixels
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.infonce import l2_normalize
from cc_jax.pretrain.batches import cut_outs, tokenize_captions
from cc_jax.pretrain.loop import fit
from data_pipeline.subjects3d.factors import real_similarity
from data_pipeline.subjects3d.prerender import Pictures, mirror_images


def make_clip(config, tokenizer) -> nnx.Dict:
  """Random text and image encoders {'text', 'vision'}; the vocabulary is the tokenizer's."""
  text = dict(
      config.clip.text.to_dict(), architectures=["CLIPTextModel"], vocab_size=len(tokenizer),
      max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
  vision = dict(config.clip.vision.to_dict(), architectures=["CLIPVisionModelWithProjection"])
  rngs = nnx.Rngs(config.seed + 1)
  towers = nnx.Dict(text=CLIPTextModel(CLIPTextConfig.from_dict(text), rngs=rngs),
                    vision=CLIPVisionModel(CLIPVisionConfig.from_dict(vision), rngs=rngs))
  if config.clip.position_scale:
    code_positions(towers.vision, CLIP_PROCESSOR, config.clip.position_scale)
  return towers


def code_positions(vision: CLIPVisionModel, processor: dict, scale: float) -> None:
  """Adds a two-dimensional sine-cosine code to the image encoder's positions, in place.

  Such a code is usual for ViTs on little data (arXiv 2205.01580): CLIP's random start of 0.02 is
  too weak beside the patches, and shapes are learned slowly. The embedding of a white patch is
  subtracted, so that on a white canvas only the subject is content.
  """
  embeddings, config = vision.vision_model.embeddings, vision.config
  side, quarter = config.image_size // config.patch_size, config.hidden_size // 4
  rates = np.pi / 2 * side ** (-np.arange(quarter) / quarter)
  angles = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"))[..., None] * rates
  code = np.concatenate([f(axis) for axis in angles for f in (np.sin, np.cos)], axis=-1)
  code = code.reshape(side * side, -1)
  white = (1 - np.asarray(processor["mean"])) / np.asarray(processor["std"])
  white = np.asarray(embeddings.patch_embedding.kernel[...]).sum((0, 1)).T @ white
  table = np.array(embeddings.position_embedding.embedding[...])
  table[1:] += scale * (code - code.mean(0)) - white
  embeddings.position_embedding.embedding[...] = jnp.asarray(table)


class FactorHeads(nnx.Module):
  """Predicts the judge's factors from the image encoder's patch tokens; used in training only.

  Each factor has its own attention over the patches. CLIP's encoders know of colours, textures and
  views from hundreds of millions of captions; with a few hundred thousand renders a small one
  learns them from labels only.
  """

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.queries = nnx.Linear(width, len(judge.HEADS), rngs=rngs)
    self.heads = nnx.Dict({name: nnx.Linear(width, size, rngs=rngs)
                           for name, size in judge.HEADS.items()})

  def __call__(self, tokens: jax.Array) -> dict[str, jax.Array]:
    """Tokens [b, p, d] -> logits [b, n] of each factor."""
    tokens = self.norm(tokens)
    pooled = jnp.einsum("bpf,bpd->fbd", jax.nn.softmax(self.queries(tokens), axis=1), tokens)
    return {name: head(x) for (name, head), x in zip(self.heads.items(), pooled)}


def similarity_correlation(
    embed: Float[jax.Array, "b e"], real: Float[jax.Array, "b b"]
) -> Float[jax.Array, ""]:
  """Correlation, over the pairs of a batch, of embeddings' cosines with `real` similarities.

  Embeddings of photographs rank similarity because captions do; those of renders are trained on
  their subjects' (`factors.real_similarity`), since MACL takes its S from them.
  """
  pairs = 1 - jnp.eye(len(embed))
  unit = l2_normalize(embed)

  def centred(x):
    return (x - jnp.sum(x * pairs) / jnp.sum(pairs)) * pairs

  cosines, real = centred(unit @ unit.T), centred(real)
  norms = jnp.sum(jnp.square(cosines)) * jnp.sum(jnp.square(real))
  return jnp.sum(cosines * real) / jnp.sqrt(jnp.maximum(norms, 1e-12))


def train_clip(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """A text and an image encoder by symmetric InfoNCE on captions and pictures (CLIP).

  With `clip.factor_weight` the image encoder also learns the factors (`FactorHeads`), and its
  embedding how similar subjects are (`similarity_correlation`).
  """
  c = config.clip
  tokenizer = load_tokenizer(workdir / "base" / "tokenizer")
  towers = make_clip(config, tokenizer)
  if config.init_from:
    base = load_base(config.init_from)
    towers = nnx.Dict(text=base.text_encoders[0], vision=base.image_encoder)
  # The UNet was trained on this text encoder's states, adapters on this image encoder's features.
  freeze = {"text": c.freeze_text, "vision_model": c.freeze_features}
  graph, frozen, params = nnx.split(
      towers, lambda path, _: any(freeze.get(name, False) for name in path), ...)
  heads = FactorHeads(c.vision.hidden_size, rngs=nnx.Rngs(config.seed + 5))
  heads_graph, heads = nnx.split(heads)
  params = dict(towers=params, heads=heads, log_scale=jnp.log(10.0))
  processor = dict(CLIP_PROCESSOR, size=c.vision.image_size)
  captions, factors = config.world.captions, pictures.factors
  ids = tokenize_captions(tokenizer, pictures, captions, config.seed)
  cut_out_ids = tokenize_captions(tokenizer, pictures, captions, config.seed + 1, cut_out=True)
  targets = {name: getattr(factors, name) for name in judge.HEADS}
  seen = judge.visible(factors, pictures.coverage)
  cut_out_seen = judge.visible(factors, pictures.coverage, cut_out=True)

  def loss_fn(params, frozen, batch, key):
    del key
    towers = nnx.merge(graph, frozen, params["towers"])
    text = towers.text(batch["ids"]).pooled
    pixels = clip_pixels(batch["images"].astype(jnp.float32) / 255, processor)
    out = towers.vision(pixels)
    contrast, metrics = cscl(
        out.image_embeds, text, temperature=jnp.exp(-jnp.clip(params["log_scale"], 0, 4)),
        subject_ids=jnp.arange(len(text)))
    loss = c.contrast_weight * contrast
    if not c.factor_weight:
      return loss, metrics
    logits = nnx.merge(heads_graph, params["heads"])(out.last_hidden_state[:, 1:])
    factor_loss, accuracies = judge.factor_loss(logits, batch["targets"], batch["seen"])
    correlation = similarity_correlation(out.image_embeds, batch["real"])
    loss += c.factor_weight * (factor_loss + 1 - correlation)
    return loss, metrics | accuracies | dict(likeness=correlation)

  def batch_fn(rng, step):
    del step
    n = c.train.batch
    index = np.sort(rng.integers(0, len(pictures.images), n))
    phrasing = rng.integers(0, captions, n)
    cut = rng.random(n) < c.white_ratio
    images = pictures.images[index]
    images[cut] = cut_outs(images[cut], pictures.masks[index[cut]], rng)
    images, labels = mirror_images(images, {name: x[index] for name, x in targets.items()},
                                   rng.random(n) < c.mirror_ratio)
    return dict(
        images=images, targets=labels,
        ids=np.where(cut[:, None], cut_out_ids[phrasing, index], ids[phrasing, index]),
        seen={name: np.where(cut, cut_out_seen[name][index], seen[name][index]) for name in seen},
        real=real_similarity(factors.take(index)).astype(np.float32))

  params = fit("clip", loss_fn, params, frozen, batch_fn, c.train, workdir, config.seed, mesh)
  towers = nnx.merge(graph, frozen, params["towers"])
  save_module(towers.text, workdir / "base" / "text_encoder")
  save_module(towers.vision, workdir / "base" / "image_encoder")
