"""A random base in the hub's layout, as small as every part allows, and batches for it.

All numbers differ from one another where they may, so that a mixed-up axis does not fit by chance.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from cc_jax.bases.save import finish_base, save_module
from configs import subjects3d

IMAGE = 16  # px
TOKENS = 16
NOUNS = ("duck", "teddy bear", "car")
CAPTIONS = ("a {} on the beach", "a photo of a {} in the snow", "the {} at night")

UNET = dict(
  _class_name="UNet2DConditionModel",
  sample_size=8,
  in_channels=4,
  out_channels=4,
  block_out_channels=[8, 16],
  down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
  up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
  mid_block_type="UNetMidBlock2DCrossAttn",
  layers_per_block=1,
  transformer_layers_per_block=1,
  norm_num_groups=4,
  attention_head_dim=2,
  cross_attention_dim=12,
  use_linear_projection=True,
  addition_embed_type="text",
  addition_embed_type_num_heads=2,
)
VAE = dict(
  _class_name="AutoencoderKL",
  in_channels=3,
  out_channels=3,
  latent_channels=4,
  block_out_channels=[4, 8],
  down_block_types=["DownEncoderBlock2D"] * 2,
  up_block_types=["UpDecoderBlock2D"] * 2,
  layers_per_block=1,
  norm_num_groups=2,
  sample_size=IMAGE,
  scaling_factor=0.5,
  mid_block_add_attention=False,
)
TEXT = dict(
  architectures=["CLIPTextModel"],
  hidden_size=12,
  intermediate_size=20,
  num_hidden_layers=1,
  num_attention_heads=2,
  max_position_embeddings=TOKENS,
  hidden_act="gelu",
  projection_dim=12,
)
VISION = dict(
  architectures=["CLIPVisionModelWithProjection"],
  hidden_size=18,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  hidden_act="gelu",
  projection_dim=10,
  image_size=IMAGE,
  patch_size=8,
)
SCHEDULER = dict(
  _class_name="DDIMScheduler",
  num_train_timesteps=1000,
  beta_schedule="squaredcos_cap_v2",
  prediction_type="v_prediction",
  timestep_spacing="trailing",
  steps_offset=1,
  clip_sample=False,
)


def tiny_base(folder: str | Path, seed: int = 0) -> Path:
  """Writes the base to `folder` and returns it. Other seeds have other weights, same shapes."""
  from cc_jax.bases.tokenizer import train_tokenizer
  from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
  from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
  from cc_jax.models.unet import UNet2DCondition
  from cc_jax.models.unet_config import UNetConfig
  from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig

  folder = Path(folder)
  texts = [caption.format(noun) for caption in CAPTIONS for noun in NOUNS]
  tokenizer = train_tokenizer(texts, folder / "tokenizer", 600, TOKENS)
  special = dict(
    vocab_size=len(tokenizer),
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
  )
  networks = {
    "unet": (UNet2DCondition, UNetConfig.from_dict(UNET)),
    "vae": (AutoencoderKL, AutoencoderKLConfig.from_dict(VAE)),
    "text_encoder": (CLIPTextModel, CLIPTextConfig.from_dict({**TEXT, **special})),
    "image_encoder": (CLIPVisionModel, CLIPVisionConfig.from_dict(VISION)),
  }
  for index, (name, (cls, config)) in enumerate(networks.items()):
    save_module(random_module(cls, config, 10 * seed + index), folder / name)
  finish_base(folder, SCHEDULER)
  return folder


def random_module(cls, config, seed: int):
  """A module filled by numpy: jax would compile an initialiser for every shape."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    name = str(path[-1])
    noise = rng.normal(size=leaf.shape)
    if name == "scale":
      values = 1 + 0.1 * noise
    elif name == "bias":
      values = 0.1 * noise
    else:
      values = noise / np.sqrt(np.prod(leaf.shape[:-1]) if name == "kernel" else leaf.shape[-1])
    return jnp.asarray(values, leaf.dtype)

  abstract = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
  definition, state = nnx.split(abstract)
  filled = {path: fill(path, leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}
  tree: dict = {}
  for path, value in filled.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return nnx.merge(definition, tree)


def tiny_config(base: str | Path, **changes) -> ml_collections.ConfigDict:
  """configs/subjects3d.py shrunk to the tiny base; `changes` by dotted key."""
  c = subjects3d.get_config()
  c.base = str(base)
  c.data.image_size = IMAGE
  c.encoder.update(
    image_layers=(1, 2), width=8, depth=1, heads=2, visual_queries=3, textual_queries=2, s_words=2
  )
  c.injection.location_width = 4
  c.train.update(
    steps=4, batch_size=4, warmup_steps=2, log_every=1, save_every=0, sample_every=0,
    prompt_sensitivity_every=0,
  )
  c.mesh.cpu_devices = 1
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return c


def batches(tokenizers, size: int, *, seed: int = 0, start: int = 0):
  """Stands for data_pipeline.make_loader: coloured blocks, a pure function of (seed, step)."""
  from data_pipeline.tokens import encode_prompt, prompt_keys

  tokenizers = tokenizers if isinstance(tokenizers, list | tuple) else (tokenizers,)
  step = start
  while True:
    rng = np.random.default_rng([seed, step])
    # Blocks of a patch's size: single noisy pixels would average out to equal features.
    batch = {
      name: rng.integers(0, 256, (size, 2, 2, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
      for name in ("positive", "reference", "target")
    }
    batch["target"] = batch["target"].astype(np.float32)  # so that a picture can hold a NaN
    batch["target_mask"] = rng.integers(0, 256, (size, IMAGE, IMAGE), dtype=np.uint8)
    nouns = rng.integers(len(NOUNS), size=size)
    for (ids, slot, span), tokenizer in zip(prompt_keys(len(tokenizers)), tokenizers):
      rows = [
        encode_prompt(tokenizer, CAPTIONS[(n + step) % 3].format(NOUNS[n]), NOUNS[n], 2)
        for n in nouns
      ]
      batch[ids] = np.stack([row[0] for row in rows])
      batch[slot] = np.asarray([row[1] for row in rows], np.int32)
      batch[span] = np.stack([row[2] for row in rows])
    batch["class_id"] = nouns.astype(np.int32)
    batch["family_id"] = nouns.astype(np.int32)
    # Two samples of one subject in every batch of three or more.
    batch["subject_id"] = np.arange(size, dtype=np.int32) // 2 * 2
    yield batch
    step += 1
