"""Trains the mini base (VAE, CLIP pair, UNet) and the judge on rendered pictures, from nothing.

  python -m cc_jax.pretrain --config=configs/subjects3d_base.py --workdir=runs/base

Stages run in the order of `config.stages`; a stage whose result lies in the workdir is skipped, an
interrupted one goes on where its last save was. The result is `workdir/base`, a folder in the
diffusers layout, and the same in float16, `workdir/subjects3d-base`. A user of CustomContrast needs
none of this: the base ships with the package.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Float
from ml_collections import config_flags

from cc_jax import errors
from cc_jax.bases import tokenizer as tokenizer_lib
from cc_jax.bases.base import load_base, load_module
from cc_jax.bases.save import finish_base, save_base, save_module
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.lab import judge as factors_judge
from cc_jax.models.clip_pixels import CLIP_PROCESSOR, clip_pixels
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.models.unet import UNet2DCondition, UNetConfig
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.objectives.cscl import cscl
from cc_jax.objectives.infonce import l2_normalize
from cc_jax.parallel.distributed import set_cpu_devices
from cc_jax.parallel.mesh import make_mesh
from cc_jax.pretrain import loop as fitting
from data_pipeline.subjects3d import captions as captions_lib
from data_pipeline.subjects3d import factors as factors_lib
from data_pipeline.subjects3d.captions import CUTOUT_MENTION_PROBS, MENTION_PROBS, write_captions
from data_pipeline.subjects3d.prerender import Pictures, prerender
from data_pipeline.triples import TripleConfig, show_reference


def main(argv: Sequence[str]) -> None:
  """Command line entry: runs the stages of --config in --workdir."""
  del argv
  config = flags.FLAGS.config
  set_cpu_devices(config.mesh, _common_batch(config))
  run(config, Path(flags.FLAGS.workdir))


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
  """Runs the stages of `config.stages` in `workdir`. Raises UserError for an unknown stage."""
  for stage in config.stages:
    if stage not in STAGES:
      raise errors.UserError(f"no pretraining stage {stage!r}; there are {', '.join(STAGES)}")
  world = config.world
  mesh = make_mesh(config.mesh, _common_batch(config))
  pictures = prerender(
      workdir / "world", world.images, seed=config.seed, split=world.split,
      calm_share=world.calm_share, plain_share=world.plain_share,
      recombine=world.recombine, processes=world.processes or None)
  for stage in config.stages:
    done = workdir / f"{stage}.done"
    if done.exists():
      print(f"{stage}: done before, skipped")
      continue
    STAGES[stage](config, workdir, pictures, mesh)
    done.touch()


# ---- captions and batches


def tokenize(tokenizer, texts: Sequence[str]) -> np.ndarray:
  """int32 [n, T] token ids, padded to the tokenizer's limit."""
  encoded = tokenizer(list(texts), padding="max_length", truncation=True,
                      max_length=tokenizer.model_max_length)
  return np.asarray(encoded["input_ids"], np.int32)


def captioned(tokenizer, pictures: Pictures, count: int, seed: int, mentions) -> np.ndarray:
  """Token ids int32 [count, n, T]: `count` phrasings of every picture."""
  rng = np.random.default_rng([seed, 1])
  return np.stack([
      tokenize(tokenizer, write_captions(rng, pictures.factors, mentions)) for _ in range(count)])


def on_white(images: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Subjects cut out of uint8 [n,h,w,3] by masks [n,h,w] and laid on white as positives are.

  Random size and place: the encoder will see references that fill the canvas, and subjects of the
  size they have in a picture teach it little of those.
  """
  config = TripleConfig(image_size=images.shape[1], reference_place="random")
  draws = rng.random((len(images), 3))
  shown = [show_reference(*row, config, u) for *row, u in zip(images, masks, draws)]
  return np.array(shown, np.uint8).reshape(images.shape)


def flipped(images: np.ndarray, flip: np.ndarray) -> np.ndarray:
  """Pictures [n,h,w,3], those of `flip` [n] left for right."""
  return np.where(flip[:, None, None, None], images[:, :, ::-1], images)


def mirrored(images: np.ndarray, factors: dict[str, np.ndarray], flip: np.ndarray):
  """(`flipped` pictures, their factors): a mirrored one shows the mirrored pose."""
  factors = factors | {name: np.where(flip, -factors[name], factors[name])
                       for name in factors_lib.MIRRORED}
  return flipped(images, flip), factors


def to_unit(images: jax.Array) -> jax.Array:
  """uint8 -> float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1


# ---- the networks


def make_vae(config) -> AutoencoderKL:
  """A random AutoencoderKL of `config.vae.model`."""
  model = AutoencoderKLConfig.from_dict(_plain(config.vae.model))
  return AutoencoderKL(model, rngs=nnx.Rngs(config.seed))


def make_clip(config, tokenizer) -> nnx.Dict:
  """Random text and image encoders {'text', 'vision'}; the vocabulary is the tokenizer's."""
  text = dict(_plain(config.clip.text), architectures=["CLIPTextModel"], vocab_size=len(tokenizer),
              max_position_embeddings=tokenizer.model_max_length,
              bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
              pad_token_id=tokenizer.pad_token_id)
  vision = dict(_plain(config.clip.vision), architectures=["CLIPVisionModelWithProjection"])
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


def likeness(embed: Float[jax.Array, "b e"], real: Float[jax.Array, "b b"]) -> jax.Array:
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


def make_unet(config) -> UNet2DCondition:
  """A random UNet of `config.unet.model`, whose residual branches and output start at zero.

  So begins guided-diffusion's UNet (arXiv 2105.05233); the first thousands of steps gain by it.
  """
  model = UNetConfig.from_dict(_plain(config.unet.model))
  unet = UNet2DCondition(model, rngs=nnx.Rngs(config.seed + 2))
  graph, params = nnx.split(unet)
  ends = ("conv2", "proj_out", "conv_out")
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: x * 0 if any(f"'{end}'" in jax.tree_util.keystr(path) for end in ends) else x,
      params)
  return nnx.merge(graph, params)


# ---- the stages


def train_tokenizer(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """A byte-pair vocabulary in CLIP's format, from the captions of the world."""
  rng = np.random.default_rng(config.seed)
  some = pictures.factors.take(slice(20_000))
  texts = write_captions(rng, some, dict.fromkeys(MENTION_PROBS, 0.7))
  tokenizer_lib.train_tokenizer(
      texts, workdir / "base" / "tokenizer", config.tokenizer.vocab_size,
      config.tokenizer.max_length)


def train_vae(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """AutoencoderKL by squared and absolute error; afterwards its latents are whitened in place."""
  c = config.vae
  vae = make_vae(config)
  if config.init_from:
    vae = load_base(config.init_from).vae
  # A changed encoder would make every latent that the UNet has learned from another one.
  fixed = ("encoder", "quant_conv") if c.freeze_encoder else ()
  graph, frozen, params = nnx.split(vae, lambda path, _: path[0] in fixed, ...)

  def loss_fn(params, frozen, batch, key):
    vae = nnx.merge(graph, frozen, params)
    x = to_unit(batch["images"])
    mean, logvar = vae.encode(x)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = vae.decode(z) - x
    squared = jnp.mean(jnp.square(error))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    # Squared error sets the colours, absolute error keeps the edges.
    loss = 4 * squared + jnp.mean(jnp.abs(error)) + c.kl * kl
    return loss, dict(psnr=10 * jnp.log10(4 / squared), kl=kl)

  def batch_fn(rng, step):
    del step
    images = pictures.images[np.sort(rng.integers(0, len(pictures.images), c.train.batch))]
    return dict(images=flipped(images, rng.random(len(images)) < 0.5))

  params = fitting.fit(
      "vae", loss_fn, params, frozen, batch_fn, c.train, workdir, config.seed, mesh)
  vae = nnx.merge(graph, frozen, params)
  if not fixed:
    whiten(vae, pictures.images[:: max(1, len(pictures.images) // 2000)])
  save_module(vae, workdir / "base" / "vae")


def whiten(vae: AutoencoderKL, images: np.ndarray) -> None:
  """Gives the latents zero mean, unit covariance by a linear map folded into the quant convs.

  With the latents' mean m and covariance C over `images`, z' = C^(-1/2) (z - m) is what the encoder
  returns from now on, and the decoder starts with its inverse: pictures stay as they were. The
  posterior's log variance becomes its average, a constant per channel, since a rotation of a
  diagonal Gaussian is not diagonal.
  """
  graph, params = nnx.split(vae)
  encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(to_unit(x)))
  means, logvars = zip(*(encode(params, jnp.asarray(images[i : i + 50]))
                         for i in range(0, len(images) - 49, 50)))
  z = np.concatenate([np.asarray(m, np.float64) for m in means])
  channels = z.shape[-1]
  z = z.reshape(-1, channels)
  mean, covariance = z.mean(0), np.cov(z.T)
  values, vectors = np.linalg.eigh(covariance)
  forward = vectors @ np.diag(values**-0.5) @ vectors.T  # z' = forward (z - mean)
  inverse = vectors @ np.diag(values**0.5) @ vectors.T
  variance = np.exp(np.concatenate([np.asarray(v, np.float64) for v in logvars])).mean((0, 1, 2))

  quant, post = vae.quant_conv, vae.post_quant_conv
  kernel = np.asarray(quant.kernel[...], np.float64)  # [1, 1, in, 2c], the mean's columns first
  bias = np.asarray(quant.bias[...], np.float64)
  kernel[0, 0, :, :channels] = kernel[0, 0, :, :channels] @ forward.T
  bias[:channels] = forward @ (bias[:channels] - mean)
  kernel[0, 0, :, channels:] = 0
  bias[channels:] = np.log(np.diag(forward @ np.diag(variance) @ forward.T))
  quant.kernel[...] = jnp.asarray(kernel, jnp.float32)
  quant.bias[...] = jnp.asarray(bias, jnp.float32)
  kernel = np.asarray(post.kernel[...], np.float64)  # [1, 1, c, out]
  bias = np.asarray(post.bias[...], np.float64)
  post.kernel[...] = jnp.asarray((inverse.T @ kernel[0, 0])[None, None], jnp.float32)
  post.bias[...] = jnp.asarray(bias + mean @ kernel[0, 0], jnp.float32)


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
  plain = captioned(tokenizer, pictures, config.world.captions, config.seed, MENTION_PROBS)
  processor = dict(CLIP_PROCESSOR, size=c.vision.image_size)
  white = captioned(tokenizer, pictures, config.world.captions, config.seed + 1,
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
    alike = likeness(out.image_embeds, batch["real"])
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
    images[cut] = on_white(images[cut], pictures.masks[index[cut]], rng)
    ids = np.where(cut[:, None], white[phrasing, index], plain[phrasing, index])
    here = {name: column[index] for name, column in seen.items()}
    here |= {name: here[name] & ~cut for name in factors_lib.CUTOUT_HIDES}
    images, labels = mirrored(images, {name: x[index] for name, x in targets.items()},
                              rng.random(n) < c.mirror_share)
    real = factors_lib.real_similarity(pictures.factors.take(index)).astype(np.float32)
    return dict(images=images, ids=ids, targets=labels, seen=here, real=real)

  params = fitting.fit(
      "clip", loss_fn, params, frozen, batch_fn, c.train, workdir, config.seed, mesh)
  towers = nnx.merge(graph, frozen, params["towers"])
  save_module(towers.text, workdir / "base" / "text_encoder")
  save_module(towers.vision, workdir / "base" / "image_encoder")


def train_unet(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """The UNet on whitened latents (docs/method.md, "Recipe of the mini base")."""
  c = config.unet
  tokenizer = load_tokenizer(workdir / "base" / "tokenizer")
  vae = load_module(workdir / "base" / "vae", AutoencoderKL)
  text_encoder = load_module(workdir / "base" / "text_encoder", CLIPTextModel)
  schedule = NoiseSchedule.from_config(_plain(c.scheduler))
  unet = make_unet(config)
  if config.init_from:
    unet = load_base(config.init_from).unet
  graph, params = nnx.split(unet)
  text_graph, text_params = nnx.split(text_encoder)

  latents = encode_all(vae, pictures, workdir / "latents.npy", mesh)
  n, side = latents.shape[:2]
  masks = np.asarray(pictures.masks).reshape(n, side, -1, side, 64 // side).mean((2, 4)) / 255
  masks = widened(masks).astype(np.float16)
  ids = captioned(tokenizer, pictures, config.world.captions, config.seed + 2, MENTION_PROBS)
  empty = tokenize(tokenizer, [""])[0]
  calm, wide = np.flatnonzero(pictures.calm), np.flatnonzero(~pictures.calm)

  def predict(params, frozen, x, t, ids):
    text = nnx.merge(text_graph, frozen["text"])(ids).last_hidden_state
    return nnx.merge(graph, params)(x, t, text)

  def loss_fn(params, frozen, batch, key):
    x0 = batch["latents"].astype(jnp.float32)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    # Stratified over the batch: less variance of the loss from the draw of t.
    u = (jnp.arange(len(x0)) + jax.random.uniform(time_key, (len(x0),))) / len(x0)
    u = c.noise_shift * u / (1 + (c.noise_shift - 1) * u)
    t = jnp.minimum((u * schedule.num_train_timesteps).astype(jnp.int32),
                    schedule.num_train_timesteps - 1)
    error = predict(params, frozen, schedule.add_noise(x0, noise, t), t, batch["ids"])
    error = error - schedule.target(x0, noise, t)
    weight = 1 + c.mask_weight * batch["masks"][..., None]
    return jnp.mean(weight * jnp.square(error)), {}

  def batch_fn(rng, step):
    n = c.train.batch
    favoured = max(0.0, 1 - step / (c.calm_until * c.train.steps)) if c.calm_until else 0.0
    from_calm = rng.random(n) < max(favoured, c.calm_share)
    index = np.where(from_calm & (len(calm) > 0), rng.choice(calm, n) if len(calm) else 0,
                     rng.choice(wide, n))
    chosen = ids[rng.integers(0, len(ids), n), index]
    chosen = np.where(rng.random(n)[:, None] < c.drop_caption, empty, chosen)
    return dict(latents=latents[index], masks=masks[index].astype(np.float32), ids=chosen)

  gaps = word_gaps(config, tokenizer, pictures, latents, schedule, predict)
  params = fitting.fit("unet", loss_fn, params, dict(text=text_params), batch_fn, c.train, workdir,
                       config.seed, mesh, watch=gaps)
  unet = nnx.merge(graph, params)
  save_module(unet, workdir / "base" / "unet")
  finish_base(workdir / "base", _plain(c.scheduler))
  # What ships as cc_jax/assets/subjects3d-base.
  save_base(load_base(workdir / "base"), workdir / "subjects3d-base", dtype="float16")


def encode_all(vae: AutoencoderKL, pictures: Pictures, file: Path, mesh) -> np.ndarray:
  """float16 latents [n, h, w, c] (the posterior's mean) of all pictures, kept in `file`."""
  if not file.exists():
    graph, params = nnx.split(vae)
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(to_unit(x))[0])
    encode = fitting.batched(encode, params, mesh, size=200, label="latents")
    np.save(file, encode(pictures.images).astype(np.float16))
  return np.load(file)


def widened(masks: np.ndarray) -> np.ndarray:
  """Masks [n, h, w] grown by one place to all sides: a shape is where it ends, too."""
  h, w = masks.shape[1:]
  padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
  return np.max([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def word_gaps(config, tokenizer, pictures, latents, schedule, predict) -> Callable:
  """`gaps(params, frozen) -> {word: rise}`: how much the loss rises with a wrong word.

  At t = 0.85 of the schedule on 192 fixed pictures (docs/method.md, "The wrong-word gap").
  """
  index = np.random.default_rng(config.seed + 3).choice(len(latents), 192, replace=False)
  captions = captions_lib.wrong_word_captions(pictures.factors.take(index), index, config.seed + 4)
  ids = {word: jnp.asarray(tokenize(tokenizer, texts)) for word, texts in captions.items()}
  x0 = jnp.asarray(latents[index], jnp.float32)
  noise = jax.random.normal(jax.random.key(config.seed), x0.shape)
  t = jnp.full(len(index), int(0.85 * schedule.num_train_timesteps))
  x, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
  loss = jax.jit(lambda params, frozen, ids: jnp.mean(
      jnp.square(predict(params, frozen, x, t, ids) - target)))

  def gaps(params, frozen):
    losses = {word: float(loss(params, frozen, ids[word])) for word in ids}
    return {f"gap_{word}": losses[word] / losses["none"] - 1 for word in ids if word != "none"}

  return gaps


def train_judge(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """The judge, on pictures rendered for it alone; its accuracy is measured on fresh ones."""
  c = config.judge
  judge = factors_judge.FactorJudge(c.width, rngs=nnx.Rngs(config.seed))
  if c.init_from:
    judge, _ = factors_judge.load_judge(Path(c.init_from))
  graph, params = nnx.split(judge)
  seen = factors_judge.visible(pictures.factors, pictures.coverage)
  targets = {name: getattr(pictures.factors, name) for name in factors_judge.HEADS}

  def loss_fn(params, frozen, batch, key):
    del frozen
    images = factors_judge.degrade(to_unit(batch["images"]), key)
    outputs = nnx.merge(graph, params)(images)
    return factors_judge.factor_loss(outputs, batch["targets"], batch["seen"])

  # Sketches come twice as often: they are few, and without colours the hardest.
  twice = pictures.factors.style == factors_lib.STYLES.index("sketch")
  order = np.concatenate([np.arange(len(twice)), np.flatnonzero(twice)])

  def batch_fn(rng, step):
    del step
    index = np.sort(order[rng.integers(0, len(order), c.train.batch)])
    flip = rng.random(c.train.batch) < 0.5
    images, labels = mirrored(
        pictures.images[index], {name: value[index] for name, value in targets.items()}, flip)
    return dict(images=images, targets=labels, seen={name: seen[name][index] for name in targets})

  params = fitting.fit("judge", loss_fn, params, {}, batch_fn, c.train, workdir, config.seed, mesh)
  judge = nnx.merge(graph, params)
  fresh = prerender(workdir / "fresh", c.fresh, seed=config.seed + 1000, split="test")
  scores = factors_judge.accuracy(
      factors_judge.read(judge, fresh.images), fresh.factors, fresh.coverage)
  print("judge on fresh renders: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
  factors_judge.save_judge(judge, workdir / "judge.safetensors", scores)


def _common_batch(config: ml_collections.ConfigDict) -> int:
  """What divides every stage's batch: the mesh is made once for all of them."""
  return math.gcd(*(section.train.batch for section in config.values()
                    if isinstance(section, ml_collections.ConfigDict) and "train" in section))


def _plain(config: ml_collections.ConfigDict) -> dict:
  return {key: list(value) if isinstance(value, tuple) else value
          for key, value in config.to_dict().items()}


STAGES: dict[str, Callable] = dict(
    tokenizer=train_tokenizer, vae=train_vae, clip=train_clip, unet=train_unet,
    judge=train_judge)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", "configs/subjects3d_base.py")
  flags.DEFINE_string("workdir", "runs/base", "Folder of the states and of the result.")
  errors.run(main)
