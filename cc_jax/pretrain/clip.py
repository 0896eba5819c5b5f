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
from cc_jax.lab import judge as factors_judge
from cc_jax.models.clip_pixels import CLIP_PROCESSOR, clip_pixels
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.infonce import l2_normalize
from cc_jax.pretrain import loop as fitting
from cc_jax.pretrain.batches import cut_outs, mirror_images, to_plain_dict, tokenize_captions
from data_pipeline.subjects3d import factors as factors_lib
from data_pipeline.subjects3d.captions import CUTOUT_MENTION_PROBS, MENTION_PROBS
from data_pipeline.subjects3d.prerender import Pictures


def make_clip(config, tokenizer) -> nnx.Dict:
  """Random text and image encoders {'text', 'vision'}; the vocabulary is the tokenizer's."""
  text = dict(to_plain_dict(config.clip.text), architectures=["CLIPTextModel"], vocab_size=len(tokenizer),
              max_position_embeddings=tokenizer.model_max_length,
              bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
              pad_token_id=tokenizer.pad_token_id)
  vision = dict(to_plain_dict(config.clip.vision), architectures=["CLIPVisionModelWithProjection"])
  rngs = nnx.Rngs(config.seed + 1)
  towers = nnx.Dict(text=CLIPTextModel(CLIPTextConfig.from_dict(text), rngs=rngs),
                    vision=CLIPVisionModel(CLIPVisionConfig.from_dict(vision), rngs=rngs))
  if config.clip.position_scale:
    code_positions(towers.vision, CLIP_PROCESSOR, config.clip.position_scale)
  return towers


def code_positions(vision: CLIPVisionModel, processor: dict, scale: float) -> None:
  """Adds a two-dimensional sine-cosine code to the image encoder's positions, in place.

  Such a code is usual for ViTs on little data (arXiv 2205.01580): CLIP's random start of 0.02
  drowns in the patches, and shapes are learned slowly. What a white patch is embedded as is taken
  off in return, so that on a white canvas only the subject is content.
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
  """Reads a picture's factors out of the image encoder while it trains; thrown away afterwards.

  From the patch tokens all factors that the judge knows, each by an attention of its own. CLIP's
  encoders know of colours, textures and views from hundreds of millions of captions; a few hundred
  thousand renders teach a small one that by labels alone.
  """

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    known = factors_judge.HEADS
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.queries = nnx.Linear(width, len(known), rngs=rngs)
    self.heads = nnx.Dict({name: nnx.Linear(width, size, rngs=rngs)
                           for name, size in known.items()})

  def __call__(self, tokens: jax.Array) -> dict[str, jax.Array]:
    """Tokens [b, p, d] -> what they say of each factor: logits [b, n]."""
    tokens = self.norm(tokens)
    read = jnp.einsum("bpf,bpd->fbd", jax.nn.softmax(self.queries(tokens), axis=1), tokens)
    return {name: head(x) for (name, head), x in zip(self.heads.items(), read)}


def similarity_correlation(embed: Float[jax.Array, "b e"], real: Float[jax.Array, "b b"]) -> jax.Array:
  """Correlation, over the pairs of a batch, of embeddings' cosines with `real` similarities.

  Photographs' CLIP embeddings rank what is alike because captions do; renders' are told how alike
  their subjects are (`factors.real_similarity`), since MACL takes its S from them.
  """
  pairs = 1 - jnp.eye(len(embed))
  unit = l2_normalize(embed)

  def centred(x):
    return (x - jnp.sum(x * pairs) / jnp.sum(pairs)) * pairs

  ours, real = centred(unit @ unit.T), centred(real)
  norms = jnp.sum(jnp.square(ours)) * jnp.sum(jnp.square(real))
  return jnp.sum(ours * real) / jnp.sqrt(jnp.maximum(norms, 1e-12))


def train_clip(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """A text and an image encoder by symmetric InfoNCE on captions and pictures (CLIP).

  With `clip.factor_weight` the image encoder learns to tell the factors, too (`FactorHeads`), and
  its embedding how alike subjects are (`likeness`).
  """
  c = config.clip
  tokenizer = load_tokenizer(workdir / "base" / "tokenizer")
  towers = make_clip(config, tokenizer)
  if config.init_from:
    base = load_base(config.init_from)
    towers = nnx.Dict(text=base.text_encoders[0], vision=base.image_encoder)
  # A changed text encoder would speak to the UNet in other words, changed features to an adapter.
  fixed = {"text": c.freeze_text, "vision_model": c.freeze_features}
  graph, frozen, params = nnx.split(
      towers, lambda path, _: any(fixed.get(name, False) for name in path), ...)
  heads = FactorHeads(c.vision.hidden_size, rngs=nnx.Rngs(config.seed + 5))
  heads_graph, heads = nnx.split(heads)
  params = dict(towers=params, heads=heads, log_scale=jnp.log(10.0))
  plain = tokenize_captions(tokenizer, pictures, config.world.captions, config.seed, MENTION_PROBS)
  processor = dict(CLIP_PROCESSOR, size=c.vision.image_size)
  white = tokenize_captions(tokenizer, pictures, config.world.captions, config.seed + 1,
                    CUTOUT_MENTION_PROBS)
  targets = {name: getattr(pictures.factors, name) for name in factors_judge.HEADS}
  seen = factors_judge.visible(pictures.factors, pictures.coverage)

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
    told = nnx.merge(heads_graph, params["heads"])(out.last_hidden_state[:, 1:])
    wrong, right = factors_judge.factor_loss(told, batch["targets"], batch["seen"])
    alike = similarity_correlation(out.image_embeds, batch["real"])
    loss += c.factor_weight * (wrong + 1 - alike)
    metrics |= right | dict(likeness=alike)
    return loss, metrics

  def batch_fn(rng, step):
    del step
    n = c.train.batch
    index = np.sort(rng.integers(0, len(pictures.images), n))
    phrasing = rng.integers(0, config.world.captions, n)
    cut = rng.random(n) < c.white_share
    images = pictures.images[index]
    images[cut] = cut_outs(images[cut], pictures.masks[index[cut]], rng)
    ids = np.where(cut[:, None], white[phrasing, index], plain[phrasing, index])
    here = {name: column[index] for name, column in seen.items()}
    here |= {name: here[name] & ~cut for name in factors_lib.CUTOUT_HIDES}
    images, labels = mirror_images(images, {name: x[index] for name, x in targets.items()},
                              rng.random(n) < c.mirror_share)
    real = factors_lib.real_similarity(pictures.factors.take(index)).astype(np.float32)
    return dict(images=images, ids=ids, targets=labels, seen=here, real=real)

  params = fitting.fit(
      "clip", loss_fn, params, frozen, batch_fn, c.train, workdir, config.seed, mesh)
  towers = nnx.merge(graph, frozen, params["towers"])
  save_module(towers.text, workdir / "base" / "text_encoder")
  save_module(towers.vision, workdir / "base" / "image_encoder")
