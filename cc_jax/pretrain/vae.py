"""Pretraining of the mini VAE."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cc_jax.bases.base import load_base
from cc_jax.bases.save import save_module
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.pretrain.batches import to_unit
from cc_jax.pretrain.loop import fit
from data_pipeline.subjects3d.prerender import Pictures, flip_images


def make_vae(config) -> AutoencoderKL:
  """A random AutoencoderKL of `config.vae.model`."""
  model = AutoencoderKLConfig.from_dict(config.vae.model.to_dict())
  return AutoencoderKL(model, rngs=nnx.Rngs(config.seed))


def train_vae(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """AutoencoderKL by squared and absolute error; afterwards its latents are whitened in place."""
  c = config.vae
  vae = make_vae(config)
  if config.init_from:
    vae = load_base(config.init_from).vae
  # With another encoder the UNet would get other latents than those that it was trained on.
  freeze = ("encoder", "quant_conv") if c.freeze_encoder else ()
  graph, frozen, params = nnx.split(vae, lambda path, _: path[0] in freeze, ...)

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
    return dict(images=flip_images(images, rng.random(len(images)) < 0.5))

  params = fit("vae", loss_fn, params, frozen, batch_fn, c.train, workdir, config.seed, mesh)
  vae = nnx.merge(graph, frozen, params)
  if not freeze:
    whiten(vae, pictures.images[:: max(1, len(pictures.images) // 2000)])
  save_module(vae, workdir / "base" / "vae")


def whiten(vae: AutoencoderKL, images: np.ndarray) -> None:
  """Gives the latents zero mean, unit covariance by a linear map folded into the quant convs.

  With the latents' mean m and covariance C over `images`, the encoder then returns
  z' = C^(-1/2) (z - m), and the decoder begins with the inverse, so that its images do not change.
  The posterior's log variance becomes its average, a constant per channel, since a rotated diagonal
  Gaussian is not diagonal.
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
