"""Pretraining of the mini UNet."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from cc_jax.bases.base import load_base, load_module
from cc_jax.bases.save import finish_base, save_base, save_module
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.models.clip_text import CLIPTextModel
from cc_jax.models.unet import UNet2DCondition, UNetConfig
from cc_jax.models.vae import AutoencoderKL
from cc_jax.parallel.mesh import batch_sharding, pad_batch, replicated_sharding
from cc_jax.pretrain.batches import to_unit, tokenize, tokenize_captions
from cc_jax.pretrain.loop import fit
from cc_jax.training.prompt_sensitivity import NOISE_LEVEL
from data_pipeline.subjects3d.captions import wrong_word_captions
from data_pipeline.subjects3d.prerender import Pictures


def make_unet(config) -> UNet2DCondition:
  """A random UNet of `config.unet.model` whose residual branches and output start at zero.

  As in guided-diffusion (arXiv 2105.05233): the first thousands of steps learn faster.
  """
  model = UNetConfig.from_dict(config.unet.model.to_dict())
  unet = UNet2DCondition(model, rngs=nnx.Rngs(config.seed + 2))
  graph, params = nnx.split(unet)
  ends = ("conv2", "proj_out", "conv_out")
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: x * 0 if any(f"'{end}'" in jax.tree_util.keystr(path) for end in ends) else x,
      params)
  return nnx.merge(graph, params)


def train_unet(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """The UNet on whitened latents (docs/method.md, "Recipe of the mini base")."""
  c = config.unet
  tokenizer = load_tokenizer(workdir / "base" / "tokenizer")
  vae = load_module(workdir / "base" / "vae", AutoencoderKL)
  text_encoder = load_module(workdir / "base" / "text_encoder", CLIPTextModel)
  schedule = NoiseSchedule.from_config(c.scheduler.to_dict())
  unet = make_unet(config)
  if config.init_from:
    unet = load_base(config.init_from).unet
  graph, params = nnx.split(unet)
  text_graph, text_params = nnx.split(text_encoder)

  latents = encode_images(vae, pictures, workdir / "latents.npy", mesh)
  n, side = latents.shape[:2]
  masks = np.asarray(pictures.masks).reshape(n, side, -1, side, 64 // side).mean((2, 4)) / 255
  masks = dilate(masks).astype(np.float16)
  ids = tokenize_captions(tokenizer, pictures, config.world.captions, config.seed + 2)
  empty = tokenize(tokenizer, [""])[0]
  calm, wide = np.flatnonzero(pictures.calm), np.flatnonzero(~pictures.calm)

  def predict(params, frozen, x, t, ids):
    text = nnx.merge(text_graph, frozen["text"])(ids).last_hidden_state
    return nnx.merge(graph, params)(x, t, text)

  def loss_fn(params, frozen, batch, key):
    x0 = batch["latents"].astype(jnp.float32)
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    # Stratified over the batch: t adds less variance to the loss.
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
    early = max(0.0, 1 - step / (c.calm_until * c.train.steps)) if c.calm_until else 0.0
    from_calm = rng.random(n) < max(early, c.calm_ratio)
    index = np.where(from_calm & (len(calm) > 0), rng.choice(calm, n) if len(calm) else 0,
                     rng.choice(wide, n))
    captions = ids[rng.integers(0, len(ids), n), index]
    captions = np.where(rng.random(n)[:, None] < c.drop_caption, empty, captions)
    return dict(latents=latents[index], masks=masks[index].astype(np.float32), ids=captions)

  params = fit(
      "unet", loss_fn, params, dict(text=text_params), batch_fn, c.train, workdir, config.seed,
      mesh, prompt_sensitivity(config, tokenizer, pictures, latents, schedule, predict))
  unet = nnx.merge(graph, params)
  save_module(unet, workdir / "base" / "unet")
  finish_base(workdir / "base", c.scheduler.to_dict())
  # What ships as cc_jax/assets/subjects3d-base.
  save_base(load_base(workdir / "base"), workdir / "subjects3d-base", dtype="float16")


def encode_images(vae: AutoencoderKL, pictures: Pictures, file: Path, mesh) -> np.ndarray:
  """float16 latents [n, h, w, c] (the posterior's mean) of all pictures, cached in `file`."""
  if not file.exists():
    graph, params = nnx.split(vae)
    params = jax.device_put(params, replicated_sharding(mesh))
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(to_unit(x))[0])
    size, latents = 200, []
    for start in tqdm(range(0, len(pictures.images), size), desc="latents", unit="batch"):
      chunk = np.asarray(pictures.images[start : start + size])
      batch = jax.device_put(pad_batch(chunk, size), batch_sharding(mesh))
      latents.append(np.asarray(encode(params, batch))[: len(chunk)])
    np.save(file, np.concatenate(latents).astype(np.float16))
  return np.load(file)


def dilate(masks: np.ndarray) -> np.ndarray:
  """Masks [n, h, w] grown by one pixel to all sides: the outside of an edge shows the shape too."""
  h, w = masks.shape[1:]
  padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
  return np.max([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def prompt_sensitivity(config, tokenizer, pictures, latents, schedule, predict) -> Callable:
  """A function (params, frozen) -> {'gap_<word>': relative rise of the loss with a wrong word}.

  The measure of `cc_jax.training.prompt_sensitivity`, without a reference, on 192 fixed pictures
  whose factors are known (docs/method.md, "The wrong-word gap").
  """
  index = np.random.default_rng(config.seed + 3).choice(len(latents), 192, replace=False)
  captions = wrong_word_captions(pictures.factors.take(index), index, config.seed + 4)
  ids = {word: jnp.asarray(tokenize(tokenizer, texts)) for word, texts in captions.items()}
  x0 = jnp.asarray(latents[index], jnp.float32)
  noise = jax.random.normal(jax.random.key(config.seed), x0.shape)
  t = jnp.full(len(index), int(NOISE_LEVEL * schedule.num_train_timesteps))
  x, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
  loss = jax.jit(lambda params, frozen, ids: jnp.mean(
      jnp.square(predict(params, frozen, x, t, ids) - target)))

  def gaps(params, frozen):
    losses = {word: float(loss(params, frozen, ids[word])) for word in ids}
    return {f"gap_{word}": losses[word] / losses["none"] - 1 for word in ids if word != "none"}

  return gaps
