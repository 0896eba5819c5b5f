"""Files that people share: single-file checkpoints, old VAEs, LoRA, IP-Adapter.

The oracle is diffusers' own reader of the same file. It has no peft here, so a LoRA's keys go
through diffusers' converters and the product is fused by torch in three lines.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
import types

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from diffusers.loaders import lora_pipeline, single_file_utils
from diffusers.utils import state_dict_utils
from flax import nnx
from test_diffusion import PUBLISHED
from test_hub import assert_bitwise, tensors
from test_unet import REAL as REAL_UNETS
from torch_parity import abstract, randomise

from cc_jax.bases import ldm_configs, ldm_names
from cc_jax.bases.base import abstract_base, load_base
from cc_jax.bases.files import ASSETS, resolve_base
from cc_jax.bases.lora_files import Lora
from cc_jax.bases.save import save_base
from cc_jax.bases.tokenizer import train_tokenizer
from cc_jax.bases.torch_names import torch_shapes
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.customcontrast.injection import InjectionConfig, LayerCondition, inject
from cc_jax.customcontrast.ip_adapter import _layers, read_ip_adapter, warm_start
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.diffusion.samplers import SAMPLERS, step_table
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.rngs import StatelessRngs
from cc_jax.models.unet import UNet2DCondition, cross_attention_layers
from cc_jax.models.unet_config import UNetConfig
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.sampling.pipeline import load

TOKENS = 12
PROMPT = "a red teapot"
VAE = dict(
  block_out_channels=[32, 64], latent_channels=4, layers_per_block=1, sample_size=16,
  down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
)  # fmt: skip
UNETS = {
  "sd1": dict(
    block_out_channels=[32, 64], layers_per_block=1, cross_attention_dim=64, attention_head_dim=8,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], sample_size=8,
  ),
  "sd2": dict(
    block_out_channels=[64, 128], layers_per_block=1, cross_attention_dim=64,
    attention_head_dim=[1, 2], use_linear_projection=True,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], sample_size=8,
  ),
  "sdxl": dict(
    block_out_channels=[64, 128], layers_per_block=1, cross_attention_dim=192,
    attention_head_dim=[1, 2], use_linear_projection=True, transformer_layers_per_block=[1, 2],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], sample_size=8,
    addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=40 + 6 * 8,
  ),
}  # fmt: skip
TEXTS = {  # hidden size, layers, activation, projection
  "sd1": [(64, 2, "quick_gelu", None)],
  "sd2": [(64, 3, "gelu", None)],
  "sdxl": [(64, 2, "quick_gelu", None), (128, 2, "gelu", 40)],
}
KINDS = list(UNETS)


# ---- small models of each family, as folder and as single file


def make_pipeline(kind, tokenizer):
  """A random pipeline of PyTorch's."""
  encoders = []
  for width, layers, act, projection in TEXTS[kind]:
    config = transformers.CLIPTextConfig(
      hidden_size=width, intermediate_size=96, num_hidden_layers=layers, hidden_act=act,
      num_attention_heads=width // 64, max_position_embeddings=TOKENS,
      projection_dim=projection or width, vocab_size=len(tokenizer),
      bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=1,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    encoders.append(randomise(cls(config), len(encoders)))
  torch.manual_seed(0)
  scale = 0.13025 if kind == "sdxl" else 0.18215
  parts = dict(
    unet=randomise(diffusers.UNet2DConditionModel(**UNETS[kind])),
    vae=randomise(diffusers.AutoencoderKL(**VAE, scaling_factor=scale)),
    text_encoder=encoders[0],
    tokenizer=tokenizer,
    scheduler=diffusers.DDIMScheduler(
      beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
      set_alpha_to_one=False, steps_offset=1,
      prediction_type="v_prediction" if kind == "sd2" else "epsilon",
    ),
    feature_extractor=None,
    image_encoder=None,
  )  # fmt: skip
  if kind == "sdxl":
    parts |= dict(text_encoder_2=encoders[1], tokenizer_2=tokenizer, add_watermarker=False)
    return diffusers.StableDiffusionXLPipeline(**parts)
  return diffusers.StableDiffusionPipeline(
    **parts, safety_checker=None, requires_safety_checker=False
  )


def torch_state(module):
  """A PyTorch text tower, under the classic names; other modules as they are."""
  state = module.state_dict()
  if isinstance(module, transformers.CLIPTextModel):
    state = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in state.items()}
  return state


def write_single_file(pipeline, checkpoint, path):
  """The pipeline in the original format, with all that such files hold besides."""
  file, thirds = {}, {}
  for component in checkpoint.configs:
    state = torch_state(getattr(pipeline, component))
    stored = {}
    if component == "text_encoder" and checkpoint.kind != "sd2":
      prefix = ldm_names.PREFIXES[checkpoint.kind][component]
      stored = {prefix + name: () for name in state}
      file[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    for name, (key, _) in ldm_names.entries(checkpoint, component, state, stored).items():
      tensor = state[name]
      if ".attn.in_proj" in key:
        part = re.search(r"\.([qkv])_proj\.", name)[1]
        thirds.setdefault(key, {})[part] = tensor
      elif component == "vae" and ".attentions." in name and name.endswith("weight"):
        file[key] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
      else:
        file[key] = tensor.T if key.endswith("text_projection") else tensor
  file |= {key: torch.cat([parts[p] for p in "qkv"]) for key, parts in thirds.items()}
  file |= {"betas": torch.ones(1000), "model_ema.decay": torch.ones(()),
           "model_ema.diffusion_modeloutbias": torch.ones(4)}  # fmt: skip
  if checkpoint.kind == "sd2":
    prefix = "cond_stage_model.model."
    last = {key: t for key, t in file.items() if ".resblocks.2." in key}
    file |= {key.replace(".resblocks.2.", ".resblocks.3."): t + 1 for key, t in last.items()}
    file |= {f"{prefix}text_projection": torch.ones(64, 64), f"{prefix}logit_scale": torch.ones(())}
  safetensors.torch.save_file({key: t.contiguous().clone() for key, t in file.items()}, path)


def small_checkpoint(kind):
  """What `describe` should find in the single file of a small pipeline."""
  configs = {"unet": UNETS[kind], "vae": VAE}
  configs |= {f"text_encoder{'_2' * i}": {} for i in range(len(TEXTS[kind]))}
  return ldm_names.Checkpoint(kind, configs, {}, "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train_tokenizer([PROMPT, "a blue car"], tmp_path_factory.mktemp("t"), 550, TOKENS)


@pytest.fixture(scope="module")
def family(tokenizer, tmp_path_factory):
  """kind -> (PyTorch's pipeline, its folder, its single file with the tokenizers beside)."""

  @functools.cache
  def make(kind):
    root = tmp_path_factory.mktemp(kind)
    pipeline = make_pipeline(kind, tokenizer)
    pipeline.save_pretrained(root / "folder")
    file = root / "file" / "model.safetensors"
    for name in ("tokenizer", "tokenizer_2"):
      if (root / "folder" / name).is_dir():
        shutil.copytree(root / "folder" / name, file.with_suffix("") / name)
    write_single_file(pipeline, small_checkpoint(kind), file)
    return pipeline, root / "folder", file

  return make


def shapes_of(file):
  return {name: value.shape for name, value in safetensors.numpy.load_file(file).items()}


# ---- drawing, with our networks under diffusers' scheduler


@functools.partial(jax.jit, static_argnums=0)
def run_text(graph, params, ids):
  outputs = [tower(ids) for tower in nnx.merge(graph, params)]
  several = len(outputs) > 1
  states = [o.hidden_states[-2] if several else o.last_hidden_state for o in outputs]
  return jnp.concatenate(states, axis=-1), outputs[-1].pooled


@functools.partial(jax.jit, static_argnums=0)
def run_unet(graph, params, x, t, context, added):
  return nnx.merge(graph, params)(x, t, context, **added)


@functools.partial(jax.jit, static_argnums=0)
def run_decoder(graph, params, z):
  return nnx.merge(graph, params).decode(z)


LATENTS = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)


def draw(base, scheduler, context_of=lambda text: text):
  """Our image [16, 16, 3] in [0, 1] of PROMPT in two steps without guidance."""
  with jax.default_matmul_precision("highest"):
    ids = jnp.asarray(base.tokenizers[0]([PROMPT], padding="max_length").input_ids)
    text, pooled = run_text(*nnx.split(nnx.List(base.text_encoders)), ids)
    added = {}
    if base.unet.config.addition_embed_type == "text_time":
      added = dict(text_embeds=pooled, time_ids=jnp.array([[16.0, 16, 0, 0, 16, 16]]))
    unet = nnx.split(base.unet)
    scheduler.set_timesteps(2)
    x = torch.from_numpy(LATENTS)
    for t in scheduler.timesteps:
      nhwc = jnp.asarray(x.permute(0, 2, 3, 1).numpy())
      out = run_unet(*unet, nhwc, jnp.array([int(t)]), context_of(text), added)
      out = torch.from_numpy(np.array(out)).permute(0, 3, 1, 2)
      x = scheduler.step(out, t, x).prev_sample
    z = x.permute(0, 2, 3, 1).numpy() / base.vae.config.scaling_factor
    image = run_decoder(*nnx.split(base.vae), jnp.asarray(z))
  return np.clip(np.asarray(image)[0] / 2 + 0.5, 0, 1)


def draw_with_diffusers(pipeline, **more):
  pipeline.set_progress_bar_config(disable=True)
  return pipeline(
    PROMPT, latents=torch.from_numpy(LATENTS), num_inference_steps=2, guidance_scale=1.0,
    height=16, width=16, output_type="np", **more,
  ).images[0]  # fmt: skip


def assert_images(base, pipeline, **more):
  ours, theirs = draw(base, pipeline.scheduler), draw_with_diffusers(pipeline, **more)
  assert theirs.std() > 0.05 and np.abs(ours - theirs).max() < 1e-4


# ---- single files


@pytest.mark.parametrize("kind", KINDS)
def test_single_file_as_diffusers_reads_it(kind, family):
  """Identical parameters, and the same picture, from the same file; the folder's very hash."""
  _, folder, file = family(kind)
  base = load_base(file)
  cls = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
  more = {} if kind == "sdxl" else dict(safety_checker=None)
  theirs = cls.from_single_file(str(file), config=str(folder), local_files_only=True, **more)
  for name, module in base.networks.items():
    assert_bitwise(tensors(module), getattr(theirs, name))
  assert base.hash == load_base(folder).hash
  assert_images(base, theirs)
  zeros = getattr(theirs.config, "force_zeros_for_empty_prompt", False)
  assert base.force_zeros_for_empty_prompt == zeros  # P2
  assert base.scheduler_config["prediction_type"] == theirs.scheduler.config.prediction_type
  expected = {"betas", "model_ema.*"}
  if kind == "sd2":
    prefix = "cond_stage_model.model."
    expected |= {f"{prefix}{x}" for x in ("transformer.resblocks.3.*", "text_projection",
                                          "logit_scale")}  # fmt: skip
  else:
    expected |= {name for name in base.unused if name.endswith("position_ids")}
    assert len(expected) == 3
  assert set(base.unused) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_architecture_from_shapes_is_the_folders(kind, family):
  """Every field that the networks read, found without a config file."""
  _, folder, file = family(kind)
  ours, wanted = abstract_base(file).networks, abstract_base(folder).networks
  assert ours.keys() == wanted.keys()
  for name, module in ours.items():
    got, config = vars(module.config), vars(wanted[name].config)
    assert {key for key in got if got[key] != config[key]} <= {"sample_size"}, name


# The published checkpoints: text towers as (class, settings), of which SD 2's file has one layer
# more than is read.
REAL_TEXTS = {
  "sd1": [(768, 12, "quick_gelu", None)],
  "sd2": [(1024, 23, "gelu", None)],
  "sdxl": [(768, 12, "quick_gelu", None), (1280, 32, "gelu", 1280)],
}
REAL_VAE = dict(
  block_out_channels=[128, 256, 512, 512], latent_channels=4, layers_per_block=2, sample_size=512,
  down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
)  # fmt: skip
# A key that CompVis', Stability's and OpenCLIP's code wrote, for each kind, and its shape.
LANDMARKS = {
  "sd1": {
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),  # no attention
    "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
  },
  "sd2": {
    single_file_utils.CHECKPOINT_KEY_NAMES["v2"]: (320, 1024),
    "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
    "cond_stage_model.model.positional_embedding": (77, 1024),
  },
  "sdxl": {
    single_file_utils.CHECKPOINT_KEY_NAMES["xl_base"]: (1280,),
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
    "conditioner.embedders.1.model.text_projection": (1280, 1280),
  },
}


@pytest.mark.parametrize("kind", KINDS)
def test_real_single_files(kind):
  """Real sizes, on the meta device: the layout is diffusers' to the last key, and so are configs.

  From our names to the file's by our map, and back by diffusers' converters.
  """
  unet_config = REAL_UNETS[{"sd1": "sd15", "sd2": "sd21"}.get(kind, kind)]
  with torch.device("meta"):
    unet = diffusers.UNet2DConditionModel(**unet_config)
    vae = diffusers.AutoencoderKL(**REAL_VAE)
  modules = {"unet": unet, "vae": vae}
  for i, (width, layers, act, projection) in enumerate(REAL_TEXTS[kind]):
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    with torch.device("meta"):
      modules[f"text_encoder{'_2' * i}"] = cls(transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, hidden_act=act,
        num_attention_heads=width // 64, projection_dim=projection or width,
      ))  # fmt: skip
  checkpoint = ldm_names.Checkpoint(
    kind, dict.fromkeys(modules, {}) | {"unet": unet_config, "vae": REAL_VAE}, {}, ""
  )
  file = {}
  for component, module in modules.items():
    state = torch_state(module)
    found = ldm_names.entries(checkpoint, component, state, {})
    for name, (key, _) in found.items():
      tensor = state[name]
      if ".attn.in_proj" in key:
        tensor = torch.empty(3 * tensor.shape[0], *tensor.shape[1:], device="meta")
      elif component == "vae" and ".attentions." in name and name.endswith("weight"):
        tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
      file[key] = tensor
  shapes = {key: tuple(tensor.shape) for key, tensor in file.items()}
  for key, shape in LANDMARKS[kind].items():
    assert shapes[key] == shape, key

  back = single_file_utils.convert_ldm_unet_checkpoint(dict(file), unet.config)
  assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in unet.state_dict().items()}
  back = single_file_utils.convert_ldm_vae_checkpoint(dict(file), vae.config)
  assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in vae.state_dict().items()}

  if kind == "sd2":
    last = {k: s for k, s in shapes.items() if ".resblocks.22." in k}
    shapes |= {k.replace(".22.", ".23."): s for k, s in last.items()}
  found = ldm_configs.describe(shapes, "file")
  assert found.kind == kind
  used = []
  classes = dict(unet=(UNet2DCondition, UNetConfig), vae=(AutoencoderKL, AutoencoderKLConfig))
  for component, module in modules.items():
    cls, config = classes.get(component, (CLIPTextModel, CLIPTextConfig))
    ours = torch_shapes(nnx.state(abstract(cls, config.from_dict(found.configs[component]))))
    assert ours == {k: tuple(v.shape) for k, v in torch_state(module).items()}
    used += [k for k, _ in ldm_names.entries(found, component, ours, shapes).values()]
    theirs = getattr(module.config, "num_attention_heads", None)
    if component.startswith("text"):
      assert found.configs[component]["num_attention_heads"] == theirs
      assert found.configs[component]["hidden_act"] == module.config.hidden_act
  wanted, got = UNetConfig.from_dict(unet_config), UNetConfig.from_dict(found.configs["unet"])
  # IP-Adapter numbers diffusers' processors, of which every other one is a cross-attention's.
  attentions = cross_attention_layers(abstract(UNet2DCondition, wanted))
  assert _layers({f"unet.{path}.attn2.gate": None for path, _ in attentions}) == {
    n: f"unet.{name.removesuffix('.processor')}"
    for n, name in enumerate(unet.attn_processors)
    if name.endswith("attn2.processor")
  }
  assert got.attention_head_dim == wanted.attention_head_dim
  assert got.transformer_layers_per_block == wanted.transformer_layers_per_block
  assert got.addition_time_embed_dim == wanted.addition_time_embed_dim
  # Whatever the sampler, its numbers are those of the published folder, which diffusers takes (P9).
  repository = single_file_utils.fetch_diffusers_config(file)["pretrained_model_name_or_path"]
  if kind == "sd2":  # Stability AI took its own repository down
    repository = repository.replace("stabilityai/", "sd2-community/")
  assert found.repository == repository
  assert found.scheduler["_class_name"] == PUBLISHED[repository.split("/")[1]]["_class_name"]
  folder = {"sd1": "stable-diffusion-v1-5", "sd2": "stable-diffusion-2-1"}
  folder = folder.get(kind, "stable-diffusion-xl-base-1.0")
  shipped = ASSETS / "architectures" / folder / "scheduler" / "scheduler_config.json"
  for sampler in (*SAMPLERS, "default"):
    wanted, *ours = (
      step_table(NoiseSchedule.from_config(config), steps=7, sampler=sampler)
      for config in (PUBLISHED[folder], json.loads(shipped.read_text()), found.scheduler)
    )
    assert all(np.array_equal(*pair) for one in ours for pair in zip(one, wanted)), sampler
  dropped = ldm_names.check(found, used, shapes, "file")
  assert list(dropped) == (
    ["cond_stage_model.model.transformer.resblocks.23.*"] if kind == "sd2" else []
  )


def resave(file, target, change):
  stored = safetensors.numpy.load_file(file)
  changed = change(stored)
  safetensors.numpy.save_file(changed if isinstance(changed, dict) else stored, target)
  return target


OUT = "model.diffusion_model.out.2.bias"


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s: {"a.weight": np.ones(2)}, r"no Stable Diffusion checkpoint .*first keys: a.weight"),
    (lambda s: s.pop(OUT), rf"1 keys missing \({OUT}\)"),
    (lambda s: s.update({f"{OUT}2": np.ones(2)}), rf"1 keys not expected \({OUT}2\)"),
    (lambda s: {k: v for k, v in s.items() if "cond_stage" not in k}, r"holds no text encoder"),
    (lambda s: s.pop("first_stage_model.decoder.conv_in.weight"),
     r"lacks first_stage_model.decoder.conv_in.weight"),
    (lambda s: s.update({"model.diffusion_model.input_blocks.0.0.weight": np.ones((32, 9, 3, 3))}),
     r"takes 9 channels, the VAE has 4: an inpainting"),
    (lambda s: s.update({OUT: np.ones(5, np.float32)}), r"conv_out.bias has the shape \(5,\)"),
  ],
)  # fmt: skip
def test_bad_single_files(change, message, family, tmp_path):
  file = family("sd1")[2]
  shutil.copytree(file.with_suffix(""), tmp_path / "bad")
  bad = resave(file, tmp_path / "bad.safetensors", change)
  with pytest.raises(UserError, match=message) as error:
    load_base(bad)
  assert "\n" not in str(error.value) and str(bad) in str(error.value)


def linear_projection(stored):
  """SDXL's second projection as the linear layer that it is."""
  key = "conditioner.embedders.1.model.text_projection"
  stored[f"{key}.weight"] = np.ascontiguousarray(stored.pop(key).T)


TOWER = "conditioner.embedders.0.transformer."
MORE = {  # what else single files hold -> what is told of it
  "sdxl": [
    (lambda s: s.update({f"{TOWER}text_projection.weight": np.ones((64, 64), np.float32)}),
     {f"{TOWER}text_projection.weight"}),
    (lambda s: s.update({f"{TOWER}text_projection": np.ones((64, 64)),
                         f"{TOWER}logit_scale": np.ones(())}),
     {f"{TOWER}text_projection", f"{TOWER}logit_scale"}),
    (linear_projection, set()),
    (lambda s: s.update({"alphas_cumprod": np.ones(9), "denoiser.sigmas": np.ones(9),
                         "model_ema.num_updates": np.ones(())}),
     {"alphas_cumprod", "denoiser.*"}),
  ],
  "sd1": [
    (lambda s: s.update({f"cond_stage_model.{key}": np.ones(2) for key in (
       "logit_scale", "transformer.text_projection.weight", "transformer.visual_projection.weight",
       "transformer.vision_model.post_layernorm.bias", "transformer.vision_model.x.weight")}),
     {f"cond_stage_model.{key}" for key in (
       "logit_scale", "transformer.text_projection.weight", "transformer.visual_projection.weight",
       "transformer.vision_model.*")}),
    (lambda s: s.update({"first_stage_model.loss.logvar": np.ones(()),
                         "first_stage_model.loss.discriminator.main.0.bias": np.ones(3),
                         "first_stage_model.model_ema.decay": np.ones(())}),
     {"first_stage_model.loss.*", "first_stage_model.model_ema.*"}),
  ],
}  # fmt: skip


@pytest.mark.parametrize("kind, number", [(k, n) for k in MORE for n in range(len(MORE[k]))])
def test_single_files_with_more_in_them(kind, number, family, tmp_path):
  """P23: the same base to the bit, and what is not used is told."""
  change, told = MORE[kind][number]
  file = family(kind)[2]
  shutil.copytree(file.with_suffix(""), tmp_path / "more")
  base = load_base(resave(file, tmp_path / "more.safetensors", change))
  plain = plain_base(file)
  assert base.plain_hash == plain.plain_hash
  assert set(base.unused) - set(plain.unused) == told


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_models_of_another_noise_schedule(mark, family, tmp_path):
  """P23: Playground's and CosXL's, which no key of the networks tells from SDXL."""
  file = family("sdxl")[2]
  bad = resave(file, tmp_path / "bad.safetensors", lambda s: s.update({mark: np.ones(1)}))
  with pytest.raises(UserError, match=rf"bad.safetensors is an EDM model \({mark}\)"):
    load_base(bad)


@pytest.mark.parametrize("marks", [("v_pred",), ("v_pred", "ztsnr")])
def test_marks_of_a_fine_tune(marks, family, tmp_path):
  """P9, P23: the folder's sampler, unless it cannot start where the file says; marks are used."""
  file = family("sd1")[2]
  shutil.copytree(file.with_suffix(""), tmp_path / "m")
  added = {mark: np.ones(1) for mark in marks}
  base = load_base(resave(file, tmp_path / "m.safetensors", lambda s: s.update(added)))
  assert set(base.unused) == set(plain_base(file).unused)
  config = base.scheduler_config
  assert config["prediction_type"] == "v_prediction"
  assert config["_class_name"] == ("DDIMScheduler" if "ztsnr" in marks else "PNDMScheduler")
  table = step_table(NoiseSchedule.from_config(config), steps=4)
  assert table.timestep[0] == (999 if "ztsnr" in marks else 751)


def converted(error, old):
  """The file that the code in a message makes of a pickle."""
  code = re.search(r"PyTorch is: (.*)", str(error))[1]
  new = old.with_suffix(".safetensors")
  exec(code, {"torch": torch, "safetensors": safetensors, "old": old, "new": new})
  return safetensors.numpy.load_file(new)


def test_unreadable_single_files(family, tmp_path):
  file = family("sd1")[2]
  (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match="truncated"):
    load_base(tmp_path / "short.safetensors")
  stored = safetensors.torch.load_file(file)
  torch.save({"state_dict": stored, "epoch": 3}, tmp_path / "old.ckpt")
  with pytest.raises(UserError, match="old.ckpt is a pickle") as error:
    load_base(tmp_path / "old.ckpt")
  assert converted(error.value, tmp_path / "old.ckpt").keys() == stored.keys()
  alone = shutil.copy(file, tmp_path / "alone.safetensors")
  with pytest.raises(UserError, match="needs a tokenizer.*stable-diffusion-v1-5"):
    load_base(alone)


def test_single_file_with_its_own_scheduler(family, tmp_path):
  _, folder, file = family("sd2")
  shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
  shutil.copytree(folder / "scheduler", tmp_path / "scheduler")
  config = tmp_path / "scheduler" / "scheduler_config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
  base = load_base(shutil.copy(file, tmp_path / "m.safetensors"))
  assert base.scheduler_config["prediction_type"] == "epsilon"


def test_a_single_file_and_its_scheduler_that_contradict_each_other(family, tmp_path):
  """Fine-tunes that predict v say so by a tensor of that name."""
  _, folder, file = family("sd1")
  marked = resave(file, tmp_path / "m.safetensors", lambda s: s.update(v_pred=np.zeros(1)))
  shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
  assert abstract_base(marked).scheduler_config["prediction_type"] == "v_prediction"
  shutil.copytree(folder / "scheduler", tmp_path / "scheduler")
  own = tmp_path / "scheduler" / "scheduler_config.json"
  with pytest.raises(UserError, match=f"{own}: contradicting prediction types: epsilon .*v_pred"):
    abstract_base(marked)
  config = json.loads(own.read_text())
  del config["prediction_type"]
  own.write_text(json.dumps(config))
  assert abstract_base(marked).scheduler_config["prediction_type"] == "v_prediction"


# ---- folders


@pytest.mark.slow
def test_sdxl_folder_round_trip(family, tmp_path):
  """Half-precision files stay what they are, bit for bit, and diffusers draws from ours."""
  pipeline, folder, _ = family("sdxl")
  half = load_base(folder, param_dtype=jnp.bfloat16)
  save_base(half, tmp_path / "half")
  stored = load_base(tmp_path / "half", param_dtype=jnp.bfloat16)
  save_base(stored, tmp_path / "again")
  assert stored.hash == load_base(tmp_path / "again").hash
  theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(
    tmp_path / "again", dtype=torch.bfloat16, local_files_only=True, add_watermarker=False
  )

  def assert_equal(dtype):
    for name in stored.networks:
      wanted = getattr(pipeline, name).state_dict()
      for key, tensor in getattr(theirs, name).state_dict().items():
        assert torch.equal(tensor, wanted[key].to(dtype)), (name, key)

  assert_equal(torch.bfloat16)
  save_base(load_base(folder), tmp_path / "full")
  theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(
    tmp_path / "full", local_files_only=True, add_watermarker=False
  )
  assert_equal(torch.float32)
  # Equal weights; torch's products still round by where a tensor lies in memory.
  assert np.abs(draw_with_diffusers(theirs) - draw_with_diffusers(pipeline)).max() < 1e-5


def test_old_vae_folder(family, tmp_path):
  """Old names and matrices with a window of one pixel, as diffusers' converter reads them."""
  _, folder, _ = family("sd1")
  shutil.copytree(folder, tmp_path / "old")
  file = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
  state, old = safetensors.torch.load_file(file), {}
  names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  for name, tensor in state.items():
    for new_name, old_name in names.items():
      if f"attentions.0.{new_name}.weight" in name:
        tensor = tensor[..., None] if old_name == "proj_attn" else tensor[..., None, None]
      name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
    old[name] = tensor.contiguous()
  assert sum(tensor.ndim == 3 for tensor in old.values()) == 2
  safetensors.torch.save_file(old, file)
  base = load_base(tmp_path / "old")
  single_file_utils.conv_attn_to_linear(old)
  safetensors.torch.save_file({k: v.contiguous() for k, v in old.items()}, file)
  theirs = diffusers.AutoencoderKL.from_pretrained(file.parent)
  assert_bitwise(tensors(base.vae), theirs)
  assert base.hash == load_base(folder).hash
  state = safetensors.torch.load_file(folder / "vae" / file.name)
  name = "encoder.mid_block.attentions.0.to_q.weight"
  state[name] = state[name][..., None].repeat(1, 1, 2)
  safetensors.torch.save_file(state, file)
  with pytest.raises(UserError, match="to_q.weight has the shape"):
    load_base(tmp_path / "old")


def test_what_is_not_used_is_named(family, tmp_path):
  folder = shutil.copytree(family("sd1")[1], tmp_path / "base")
  (folder / "safety_checker").mkdir()
  (folder / "safety_checker" / "model.safetensors").write_bytes(b"never read")
  (folder / "demo").mkdir()
  index = json.loads((folder / "model_index.json").read_text())
  index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
  (folder / "model_index.json").write_text(json.dumps(index))
  assert load_base(folder).unused == ("demo/", "safety_checker/")
  shutil.rmtree(folder / "tokenizer")
  with pytest.raises(UserError, match="0 tokenizer.* for 1 text encoder"):
    load_base(folder)


def test_a_sharding_for_each_tensor(family):
  """The rule sees the names of the frozen part, and what it says holds."""
  _, folder, _ = family("sd1")
  mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
  wanted = jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
  asked = {}

  def rule(path, shape):
    asked[path] = shape
    return wanted if len(shape) == 2 else None

  base = load_base(folder, sharding=rule)
  for path in ("unet.conv_in.kernel", "text_encoders.0.text_model.final_layer_norm.scale",
               "vae.decoder.mid_block.attentions.0.to_out.0.kernel"):  # fmt: skip
    assert path in asked
  assert asked["unet.conv_in.kernel"] == (3, 3, 4, 32)
  for module in base.networks.values():
    for _, leaf in nnx.to_flat_state(nnx.state(module)):
      value = leaf.get_value()
      assert (value.sharding == wanted) == (value.ndim == 2)
  plain = load_base(folder)
  assert np.array_equal(plain.unet.conv_in.kernel[...], base.unet.conv_in.kernel[...])


# ---- the hub's cache


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache in the library's layout; `add(repository, folder, revision)` fills it."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

  def add(repository, source, inside="", revision="main", commit=COMMIT):
    root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, root / "snapshots" / commit / inside, dirs_exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)

  return add


def test_hub_id_from_the_cache(family, cache):
  """Offline, as the environment of the tests says: by branch, by commit, by an unknown one."""
  _, folder, file = family("sd1")
  wanted = load_base(folder).hash
  cache("somebody/a-model", folder)
  cache("somebody/a-model", family("sd2")[1], revision="v2", commit=COMMIT[::-1])
  for name in ("somebody/a-model", f"somebody/a-model@{COMMIT}", "somebody/a-model@main"):
    base = load_base(name)
    assert (base.hash, base.name) == (wanted, name)
  assert abstract_base("somebody/a-model@v2").unet.config.use_linear_projection
  for name in ("somebody/a-model@v3", "nobody/at-all", "nobody/at-all/file.safetensors"):
    with pytest.raises(UserError, match=f"{name}' is no folder.*HF_HUB_OFFLINE is set") as error:
      load_base(name)
    assert "\n" not in str(error.value)
  # A single file on the hub; its tokenizer is that of the published model.
  cache("somebody/a-file", file.parent)
  with pytest.raises(UserError, match="needs a tokenizer"):
    shutil.rmtree(resolve_base("somebody/a-file/model.safetensors").with_suffix(""))
    load_base("somebody/a-file/model.safetensors")
  cache("stable-diffusion-v1-5/stable-diffusion-v1-5", folder / "tokenizer", "tokenizer")
  assert load_base("somebody/a-file/model.safetensors").hash == wanted


def test_only_what_is_used_is_downloaded(family, cache, monkeypatch):
  """The patterns that the hub is asked for, and the fp16 files only where there are no others."""
  _, folder, _ = family("sd1")
  cache("somebody/half", folder)
  asked = []
  original = huggingface_hub.snapshot_download

  def spy(*, allow_patterns, **more):
    asked.append(allow_patterns)
    return original(allow_patterns=allow_patterns, **more)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
  root = resolve_base("somebody/half")
  assert len(asked) == 2 and "unet/diffusion_pytorch_model.safetensors" in asked[1]
  assert not any("fp16" in pattern or "safety_checker" in pattern for pattern in asked[1])
  (root / "unet" / "diffusion_pytorch_model.safetensors").rename(
    root / "unet" / "diffusion_pytorch_model.fp16.safetensors_"
  )
  with pytest.raises(UserError, match="lacks unet/diffusion_pytorch_model.safetensors"):
    resolve_base("somebody/half")
  assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked[-1]


# ---- LoRA

RANK, SCALE = 3, 0.7
MODULES = {  # in our (diffusers') names; of each kind of layer there is
  "unet": [
    r"transformer_blocks\.0\.attn1\.to_(q|out\.0)$", r"transformer_blocks\.0\.attn2\.to_[kv]$",
    r"ff\.net\.(0\.proj|2)$", r"proj_(in|out)$", r"resnets\.\d\.conv[12]$", r"conv_shortcut$",
    r"time_emb_proj$", r"samplers\.0\.conv$", r"^conv_in$", r"^time_embedding\.linear_2$",
  ],
  "text_encoder": [r"self_attn\.(q|k|v|out)_proj$", r"mlp\.fc[12]$"],
}  # fmt: skip
ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$"


def factors(pipeline, only=""):
  """(component, module) -> (down, up, alpha), for modules of every kind, in PyTorch's layout."""
  rng = np.random.default_rng(1)
  found = {}
  for component in ("unet", "text_encoder", "text_encoder_2"):
    patterns = MODULES["unet" if component == "unet" else "text_encoder"]
    module = getattr(pipeline, component, None) or torch.nn.Module()
    for name, tensor in torch_state(module).items():
      name = name.removesuffix(".weight")
      if tensor.ndim < 2 or not any(re.search(p, name) for p in patterns):
        continue
      if only and not re.search(only, name):
        continue
      down = 0.1 * rng.standard_normal((RANK, *tensor.shape[1:]))
      up = 0.1 * rng.standard_normal((tensor.shape[0], RANK, *[1] * (tensor.ndim - 2)))
      alpha = float(rng.integers(1, 5))
      found[component, name] = (down.astype(np.float32), up.astype(np.float32), alpha)
  return found


def kohya(found, pipeline, sgm=False):
  names = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
  if sgm:
    names["text_encoder"] = "lora_te1"
  config = UNetConfig.from_dict(dict(pipeline.unet.config))
  file = {}
  for (component, module), (down, up, alpha) in found.items():
    if component == "unet" and sgm:
      module = ldm_names.unet_names(config, [module])[module]
    key = f"{names[component]}_{module.replace('.', '_')}"
    file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
             f"{key}.alpha": np.array(alpha, np.float32)}  # fmt: skip
  return file


def peft(found, pipeline):
  file = {}
  for (component, module), (down, up, _) in found.items():
    key = f"{component}.{module}"
    file |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
  return file


def old_diffusers(found, pipeline):
  """Attention only: processors of the UNet, `to_q_lora` in the text encoder as well."""
  file = {}
  for (component, module), (down, up, _) in found.items():
    parent, last = re.fullmatch(r"(.+?)\.((?:to_)?(?:q|k|v|out)(?:_proj|\.0)?)", module).groups()
    last = "to_" + re.sub(r"to_|_proj|\.0", "", last)
    between = ".processor" if component == "unet" else ""
    key = f"{component}.{parent}{between}.{last}_lora"
    file |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
  return file


def linear_layer(found, pipeline):
  """`lora_linear_layer` in the text encoder, `.lora.down` in the UNet."""
  file = {}
  for (component, module), (down, up, _) in found.items():
    key = f"{component}.{module}.{'lora' if component == 'unet' else 'lora_linear_layer'}"
    file |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
  return file


FORMATS = {
  "kohya": (kohya, "sd1", ""),
  "kohya_sdxl": (functools.partial(kohya, sgm=True), "sdxl", ""),
  "peft": (peft, "sd1", ""),
  "peft_sdxl": (peft, "sdxl", ""),
  "old": (old_diffusers, "sd1", ATTENTION),
  "linear_layer": (linear_layer, "sd1", ATTENTION),
}


def fuse_with_diffusers(pipeline, file):
  """The fused weights of a copy of the pipeline; keys and alphas by diffusers' own converters."""
  stored = {key: torch.from_numpy(value) for key, value in file.items()}
  if isinstance(pipeline, diffusers.StableDiffusionXLPipeline):
    state, alphas = lora_pipeline.StableDiffusionXLLoraLoaderMixin.lora_state_dict(
      stored, unet_config=pipeline.unet.config
    )
  else:
    state, alphas = lora_pipeline.StableDiffusionLoraLoaderMixin.lora_state_dict(stored)
  fused, count = {}, 0
  for component in ("unet", "text_encoder", "text_encoder_2"):
    own, scales = (
      {k.removeprefix(f"{component}."): v for k, v in d.items() if k.startswith(f"{component}.")}
      for d in (state, alphas or {})
    )
    if not own:
      continue
    if component == "unet":
      convert = state_dict_utils.convert_unet_state_dict_to_peft
    elif any("lora_A" in key for key in own):
      convert = dict
    else:
      own = state_dict_utils.convert_state_dict_to_diffusers(own)
      scales = state_dict_utils.convert_state_dict(
        scales, state_dict_utils.DIFFUSERS_OLD_TO_DIFFUSERS
      )
      convert = state_dict_utils.convert_state_dict_to_peft
      convert = functools.partial(convert, original_type=state_dict_utils.StateDictType.DIFFUSERS)
    own, scales = convert(own), convert(scales) if scales else {}
    scales = {re.sub(r"(\.lora_A\.weight)?\.alpha$", "", key): v for key, v in scales.items()}
    weights = torch_state(getattr(pipeline, component))
    weights = {key: value.clone() for key, value in weights.items()}
    for key in own:
      if key.endswith(".lora_A.weight"):
        module = key.removesuffix(".lora_A.weight")
        down, up = own[key], own[f"{module}.lora_B.weight"]
        rate = scales.get(module, RANK) / RANK
        weight = weights[f"{module}.weight"]
        weight += SCALE * rate * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        count += 1
    fused[component] = weights
  assert 2 * count == len([key for key in file if not key.endswith("alpha")])
  return fused


@functools.cache
def plain_base(checkpoint):
  return load_base(checkpoint)


@pytest.mark.parametrize("name", FORMATS)
def test_lora_formats(name, family, tmp_path):
  write, kind, only = FORMATS[name]
  pipeline, _, checkpoint = family(kind)  # a program that the test of single files has compiled
  file = write(factors(pipeline, only), pipeline)
  safetensors.numpy.save_file(file, tmp_path / "lora.safetensors")
  base = load_base(checkpoint, lora=[(tmp_path / "lora.safetensors", SCALE)])
  wanted = fuse_with_diffusers(pipeline, file)
  plain = plain_base(checkpoint)
  assert len(wanted) == (3 if kind == "sdxl" else 2)
  for component, module in base.networks.items():
    before = tensors(plain.networks[component])
    for key, value in tensors(module).items():
      classic = f"text_model.{key}" if isinstance(module, CLIPTextModel) and not (
        module.config.with_projection) else key  # fmt: skip
      target = wanted.get(component, {}).get(classic)
      target = before[key] if target is None else target.numpy()
      assert np.abs(value - target).max() <= 1e-6 * np.abs(target).max(), (component, key)
  assert base.hash != plain.hash == base.plain_hash
  theirs = make_pipeline(kind, pipeline.tokenizer)
  for component, state in wanted.items():
    module = getattr(theirs, component)
    if not hasattr(module, "text_model") and component != "unet":
      state = {key.removeprefix("text_model."): value for key, value in state.items()}
    module.load_state_dict(state)
  assert np.abs(draw_with_diffusers(theirs) - draw_with_diffusers(pipeline)).max() > 1e-3
  assert_images(base, theirs)


def test_lora_of_three_factors(family, tmp_path):
  """A convolution as 1x1, 3x3, 1x1 in sequence (LoCon); PyTorch runs the three."""
  pipeline, folder, _ = family("sd1")
  rng = np.random.default_rng(0)
  name = "mid_block.resnets.0.conv1"
  weight = pipeline.unet.state_dict()[f"{name}.weight"]
  down, mid, up = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((2, 64, 1, 1), (2, 2, 3, 3), (64, 2, 1, 1))
  )
  key = f"lora_unet_{name.replace('.', '_')}"
  safetensors.numpy.save_file(
    {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up,
     f"{key}.alpha": np.array(1.0)}, tmp_path / "l.safetensors",
  )  # fmt: skip
  base = load_base(folder, lora=[(tmp_path / "l.safetensors", 1.0)])
  x = torch.from_numpy(rng.standard_normal((1, 64, 5, 5)).astype(np.float32))
  conv = torch.nn.functional.conv2d
  steps = conv(conv(conv(x, torch.from_numpy(down)), torch.from_numpy(mid), padding=1),
               torch.from_numpy(up))  # fmt: skip
  merged = torch.from_numpy(tensors(base.unet)[f"{name}.weight"])
  out = conv(x, merged, padding=1) - conv(x, weight, padding=1)
  assert (out - 0.5 * steps).abs().max() < 1e-4 * steps.abs().max()


def test_several_loras_and_peft_alphas(family, tmp_path):
  """Two files add up; alphas that diffusers writes into the header count."""
  pipeline, folder, _ = family("sd1")
  (key, (down, up, _)), *_ = factors(pipeline, r"attn1\.to_q$").items()
  name = ".".join(key)
  stored = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
  settings = {"unet.r": RANK, "unet.lora_alpha": 12, "unet.alpha_pattern": {"other": 1}}
  safetensors.numpy.save_file(
    stored, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)}
  )
  stored = {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
  safetensors.numpy.save_file(stored, tmp_path / "b.safetensors")
  base = load_base(
    folder, lora=[(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", -1)]
  )
  weight = f"{key[1]}.weight"
  change = tensors(base.unet)[weight] - pipeline.unet.state_dict()[weight].numpy()
  wanted = (0.5 * 12 / RANK - 1) * (up @ down)
  assert np.abs(change - wanted).max() < 1e-5 * np.abs(wanted).max() + 1e-6


def test_lora_for_another_base(family, tmp_path):
  """The first modules that differ are named, and nothing has been merged."""
  pipeline, folder, _ = family("sdxl")
  file = tmp_path / "lora.safetensors"
  safetensors.numpy.save_file(kohya(factors(pipeline), pipeline, sgm=True), file)
  with pytest.raises(UserError, match=r"for another base.*not in this base: .*text_encoder_2's"):
    load_base(family("sd1")[1], lora=[(file, 1.0)])
  safetensors.numpy.save_file(peft(factors(pipeline, r"down.*attn2"), pipeline), file)
  with pytest.raises(UserError, match=r"modules have other shapes|not in this base"):
    load_base(family("sd2")[1], lora=[(file, 1.0)])
  module = "unet.mid_block.attentions.0.proj_in"
  stored = dict(lora_A=np.ones((2, 9)), lora_B=np.ones((64, 2)))
  safetensors.numpy.save_file({f"{module}.{k}.weight": v for k, v in stored.items()}, file)
  with pytest.raises(UserError, match=r"1 of its 1 modules have other shapes: .*\(64, 9") as error:
    load_base(family("sd1")[1], lora=[(file, 1.0)])
  assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
  "stored, message",
  [
    ({"lora_unet_conv_in.oft": np.ones((2, 2))}, "oft, which is none of a LoRA, LoHa"),
    ({"lora_unet_conv_in.lora_down.weight": np.ones((2, 2))}, "lacks the up weights of conv_in"),
    ({"unet.conv_in.lora_A.weight": np.ones((2, 3)), "unet.conv_in.lora_B.weight": np.ones((4, 5))},
     "do not multiply"),
    ({"unet.conv_in.lora_A.weight": np.ones((2, 3)), "unet.conv_in.lora.down.weight": np.ones(1)},
     "two spellings"),
    ({}, "is empty"),
  ],
)  # fmt: skip
def test_bad_loras(stored, message, tmp_path):
  safetensors.numpy.save_file(stored, tmp_path / "l.safetensors")
  with pytest.raises(UserError, match=message):
    Lora(tmp_path / "l.safetensors")
  with pytest.raises(UserError, match="pickle"):
    (tmp_path / "l.pt").write_bytes(b"")
    Lora(tmp_path / "l.pt")
  with pytest.raises(UserError, match="nowhere is no file"):
    Lora("nowhere")


# ---- IP-Adapter

WIDTH, QUERIES, FEATURES = 64, 4, 20


def ip_adapter(pipeline, width=WIDTH, plus=True):
  """A random IP-Adapter(-plus) for a small SD 1.x, in the published files' names."""
  rng = np.random.default_rng(3)
  image = dict(latents=(1, QUERIES, width), **{
    "proj_in.weight": (width, FEATURES), "proj_in.bias": (width,),
    "proj_out.weight": (WIDTH, width), "proj_out.bias": (WIDTH,),
    "norm_out.weight": (WIDTH,), "norm_out.bias": (WIDTH,),
  })  # fmt: skip
  for n in range(4):  # what diffusers takes every such file to have
    for name, shape in {
      "0.norm1.weight": (width,), "0.norm1.bias": (width,), "0.norm2.weight": (width,),
      "0.norm2.bias": (width,), "0.to_q.weight": (width, width),
      "0.to_kv.weight": (2 * width, width), "0.to_out.weight": (width, width),
      "1.0.weight": (width,), "1.0.bias": (width,), "1.1.weight": (4 * width, width),
      "1.3.weight": (width, 4 * width),
    }.items():  # fmt: skip
      image[f"layers.{n}.{name}"] = shape
  if not plus:
    image = {"proj.weight": (4 * WIDTH, FEATURES), "proj.bias": (4 * WIDTH,),
             "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}  # fmt: skip
  file = {f"image_proj.{name}": shape for name, shape in image.items()}
  # In the order of diffusers' processors; every other one is a cross-attention.
  for n, name in enumerate(pipeline.unet.attn_processors):
    if name.endswith("attn2.processor"):
      channels = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
      file |= {f"ip_adapter.{n}.to_{p}_ip.weight": (channels, WIDTH) for p in "kv"}
  return {key: 0.3 * rng.standard_normal(s).astype(np.float32) for key, s in file.items()}


def adapter_parts(folder, **encoder):
  """(definition, trainable zeros) of a small adapter around the base, nothing compiled."""
  vision = dict(
    architectures=["CLIPVisionModel"], hidden_size=FEATURES, intermediate_size=8, image_size=16,
    num_hidden_layers=1, num_attention_heads=2, patch_size=8,
  )  # fmt: skip
  tower = folder.parent / "tower"
  tower.mkdir(exist_ok=True)
  (tower / "config.json").write_text(json.dumps(vision))
  settings = dict(
    image_layers=(1,), width=WIDTH, depth=4, heads=1, visual_queries=QUERIES, textual_queries=1,
    s_words=1, image_encoder="",
  )  # fmt: skip
  base = abstract_base(folder, image_encoder=tower)
  encoder = MFIEncoderConfig(**(settings | encoder))
  injection = InjectionConfig(location=False)
  parts = build_customcontrast(base, encoder, injection, transform=eval_shape_only)
  return {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in parts[1].items()}


@pytest.fixture(scope="module")
def with_ip_adapter(family, tmp_path_factory):
  """(a pipeline in which diffusers has loaded the plus file, that file)."""
  _, folder, _ = family("sd1")
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
  file = tmp_path_factory.mktemp("ip") / "ip-adapter-plus.safetensors"
  safetensors.numpy.save_file(ip_adapter(pipeline), file)
  pipeline.load_ip_adapter(
    str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None,
    local_files_only=True,
  )  # fmt: skip
  return pipeline, file


def test_ip_adapter_plus_as_diffusers_reads_it(with_ip_adapter, family):
  """The parameters of diffusers' processors and Resampler, each in our place for it."""
  pipeline, file = with_ip_adapter
  started, report = warm_start(adapter_parts(family("sd1")[1]), file)
  wanted = {}
  for name, processor in pipeline.unet.attn_processors.items():
    if hasattr(processor, "to_k_ip"):
      path = f"unet.{name.removesuffix('.processor')}"
      wanted[f"{path}.to_k_visual.kernel"] = processor.to_k_ip[0].weight.T
      wanted[f"{path}.to_v_visual.kernel"] = processor.to_v_ip[0].weight.T
  attentions = len(wanted) // 2
  visual = "mfi_encoder.visual"
  resampler = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
  wanted |= {
    f"{visual}.proj_in.kernel": resampler.proj_in.weight.T,
    f"{visual}.proj_in.bias": resampler.proj_in.bias,
    f"{visual}.norm_out.scale": resampler.norm_out.weight,
    f"{visual}.norm_out.bias": resampler.norm_out.bias,
    f"{visual}.queries": torch.cat([torch.zeros(1, WIDTH), resampler.latents[0]]),
  }
  for n, layer in enumerate(resampler.layers):
    wanted |= {f"{visual}.blocks.{n}.{name}": value for name, value in {
      "norm_attn.scale": layer.ln1.weight, "norm_attn.bias": layer.ln1.bias,
      "to_q.kernel": layer.attn.to_q.weight.T, "to_k.kernel": layer.attn.to_k.weight.T,
      "to_v.kernel": layer.attn.to_v.weight.T, "to_out.kernel": layer.attn.to_out[0].weight.T,
      "norm_ff.scale": layer.ff[0].weight, "norm_ff.bias": layer.ff[0].bias,
      "ff_in.kernel": layer.ff[1].net[0].proj.weight.T,
      "ff_out.kernel": layer.ff[1].net[2].weight.T,
    }.items()}  # fmt: skip
  assert {ours for _, ours in report.used} == wanted.keys()
  for path, value in started.items():
    target = wanted[path].detach().numpy() if path in wanted else np.zeros(value.shape)
    assert np.array_equal(value, target), path
  # Every tensor of the file is in the report.
  left = {theirs for theirs, _ in report.left}
  assert left == {"image_proj.proj_out.weight", "image_proj.proj_out.bias"} | {
    f"image_proj.layers.{n}.0.norm1.{kind}" for n in range(4) for kind in ("weight", "bias")
  }
  everything = set(safetensors.numpy.load_file(file))
  assert left | {theirs for theirs, _ in report.used} == everything
  used, total = len(everything) - len(left), len(everything)
  assert f"{used} of {total} tensors used, in {attentions} visual" in str(report)


def test_image_of_an_ip_adapter(with_ip_adapter, family):
  """With the gate open and no map, our visual cross-attention is IP-Adapter's: the same picture."""
  pipeline, file = with_ip_adapter
  started, _ = warm_start(adapter_parts(family("sd1")[1]), file)
  base = load_base(family("sd1")[2])
  inject(base.unet, InjectionConfig("visual_only", location=False), visual_width=WIDTH,
         rngs=StatelessRngs(0))  # fmt: skip
  for path, block in cross_attention_layers(base.unet):
    block.attn2.to_k_visual.kernel[...] = started[f"unet.{path}.attn2.to_k_visual.kernel"]
    block.attn2.to_v_visual.kernel[...] = started[f"unet.{path}.attn2.to_v_visual.kernel"]
    block.attn2.gate[...] = jnp.ones(())
  features = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 1, 5, FEATURES)))
  features = features.float()
  with torch.no_grad():
    tokens = pipeline.unet.encoder_hid_proj([features])[0][:, 0].numpy()

  def contexts(text):
    condition = LayerCondition(text=text, visual=jnp.asarray(tokens), scale=jnp.array([0.6]))
    return (condition,) * len(cross_attention_layers(base.unet))

  pipeline.set_ip_adapter_scale(0.6)
  theirs = draw_with_diffusers(pipeline, ip_adapter_image_embeds=[features])
  pipeline.set_ip_adapter_scale(0.0)
  without = draw_with_diffusers(pipeline, ip_adapter_image_embeds=[features])
  assert np.abs(theirs - without).max() > 1e-3
  assert np.abs(draw(base, pipeline.scheduler, contexts) - theirs).max() < 1e-4


def test_ip_adapter_layouts(with_ip_adapter, family):
  """The file's prefixes, those of IP-Adapter's training, and what its pickles hold: all alike."""
  _, file = with_ip_adapter
  wanted = safetensors.numpy.load_file(file)
  nested = {"image_proj": {}, "ip_adapter": {}}
  for name, value in wanted.items():
    part, _, rest = name.partition(".")
    nested[part][rest] = torch.from_numpy(value)
  trained = {
    name.replace("image_proj.", "image_proj_model.").replace("ip_adapter.", "adapter_modules."): v
    for name, v in wanted.items()
  }
  other = file.with_name("trained.safetensors")
  safetensors.numpy.save_file(trained, other)
  pickled = file.with_name("pickled.bin")
  torch.save(nested, pickled)
  with pytest.raises(UserError, match="pickle") as error:
    read_ip_adapter(pickled)
  assert converted(error.value, pickled).keys() == wanted.keys()
  for source in (file, nested, other, pickled.with_suffix(".safetensors")):
    got = read_ip_adapter(source)
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)


def test_what_does_not_fit_is_left(family, tmp_path):
  pipeline, folder, _ = family("sd1")
  file = tmp_path / "ip.safetensors"
  # Another number of queries, other features, no Resampler: the attentions are taken all the same.
  safetensors.numpy.save_file(ip_adapter(pipeline), file)
  started, report = warm_start(adapter_parts(folder, visual_queries=5, image_layers=(0, 1)), file)
  left = dict(report.left)
  assert "(6, 64), there (5, 64)" in left["image_proj.latents"]
  assert "(40, 64), there (20, 64)" in left["image_proj.proj_in.weight"]
  assert not np.any(started["mfi_encoder.visual.queries"])
  safetensors.numpy.save_file(ip_adapter(pipeline, plus=False), file)
  _, report = warm_start(adapter_parts(folder), file)
  assert all("visual" in ours and "unet" in ours for _, ours in report.used)
  assert {name for name, _ in report.left} == {
    f"image_proj.{name}" for name in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
  }
  with pytest.raises(UserError, match="nothing that fits.*config.encoder.width"):
    warm_start(adapter_parts(folder, width=32), file)
  safetensors.numpy.save_file({"a": np.ones(1)}, file)
  with pytest.raises(UserError, match="is no IP-Adapter .*first tensors: a"):
    warm_start({}, file)
  with pytest.raises(UserError, match="pickle"):
    (tmp_path / "ip.bin").write_bytes(b"")
    warm_start({}, tmp_path / "ip.bin")
  with pytest.raises(UserError, match="nowhere is no file"):
    warm_start({}, "nowhere")


# ---- memory

MEASURE = """
import sys, threading, time
import jax, jax.numpy as jnp
from cc_jax import generate
from cc_jax.bases import base as hub

def anonymous():
  for line in open("/proc/self/status"):
    if line.startswith("RssAnon"):
      return int(line.split()[1]) * 1024

jnp.ones(3).block_until_ready()
import transformers.models.clip
before, peak, done = anonymous(), 0, False

def watch():
  global peak
  while not done:
    peak = max(peak, anonymous())
    time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
base = hub.load_base(sys.argv[1], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
jax.block_until_ready([x for m in base.networks.values() for x in jax.tree.leaves(
  __import__("flax").nnx.state(m))])
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_file(family, tmp_path):
  """Stable Diffusion 1.5's size in bfloat16: the peak of anonymous memory above the start's."""
  folder = tmp_path / "sd15"
  configs = ASSETS / "architectures" / "stable-diffusion-v1-5"
  shutil.copytree(configs, folder)
  shutil.copytree(family("sd1")[1] / "tokenizer", folder / "tokenizer")
  base = abstract_base(folder)
  noise = np.random.default_rng(0).standard_normal(2**20).astype(jnp.bfloat16)
  size = 0
  for name, module in base.networks.items():
    shapes = torch_shapes(nnx.state(module))
    stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
    file = folder / name / f"{stem}.safetensors"
    safetensors.numpy.save_file({key: np.resize(noise, s) for key, s in shapes.items()}, file)
    size += file.stat().st_size
  assert size > 2.1e9
  result = subprocess.run(
    [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True
  )
  peak = int(result.stdout)
  print(f"peak {peak / size:.3f} of the file's {size / 1e9:.2f} GB")
  assert 0.9 * size < peak < 1.3 * size


# ---- pictures as users ask for them, against diffusers' pipelines


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_generate_draws_what_diffusers_pipeline_draws(kind, family, monkeypatch):
  """Negative prompt, guidance, two seeds, a size with odd latents, clip-skip, SDXL's sizes."""
  theirs, folder, _ = family(kind)
  pipe = load(base=folder)
  size = dict(height=5 * pipe.sampler.factor, width=9 * pipe.sampler.factor)
  told = {}
  if kind == "sdxl":
    told = dict(original_size=(30, 50), crop=(2, 3), target_size=(20, 40))
  noise = pipe.sampler.noise([7, 3], (5, 9))
  given = dict(clip_skip=1, **size)
  found = pipe(
    PROMPT, seed=[7, 3], steps=3, guidance=2.5, negative_prompt="a duck", **given, **told
  )
  told = {"crops_coords_top_left" if k == "crop" else k: v for k, v in told.items()}
  theirs.set_progress_bar_config(disable=True)
  # transformers 5 dissolved text_model, where diffusers looks for the norm under clip_skip.
  norm = types.SimpleNamespace(final_layer_norm=theirs.text_encoder.final_layer_norm)
  object.__setattr__(theirs.text_encoder, "text_model", norm)
  monkeypatch.setattr(type(theirs), "check_inputs", lambda *_, **__: None)  # it wants 8 pixels
  # diffusers skips layers for the prompt alone; we do for both, as those who train so expect.
  away = theirs.encode_prompt("a duck", device="cpu", num_images_per_prompt=1,
                              do_classifier_free_guidance=False, clip_skip=1)  # fmt: skip
  given["negative_prompt_embeds"] = away[0]
  if kind == "sdxl":
    given["negative_pooled_prompt_embeds"] = away[2]
  expected = theirs(
    PROMPT, num_images_per_prompt=2, latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
    num_inference_steps=3, guidance_scale=2.5, output_type="np", **given, **told,
  ).images  # fmt: skip
  assert_pictures(found, expected)
  assert expected.shape[1:3] == (size["height"], size["width"])


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_image_to_image_is_diffusers(strength, family, monkeypatch):
  theirs, folder, _ = family("sd1")
  pipe = load(base=folder)
  shape = (3, 5)
  height, width = (side * pipe.sampler.factor for side in shape)
  start = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  found = pipe(
    PROMPT, seed=4, num_images=2, steps=4, guidance=2.5, height=height, width=width, image=start,
    strength=strength,
  )  # fmt: skip

  noise = np.moveaxis(pipe.sampler.noise([4, 5], shape), -1, 1).copy()
  module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
  monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
  pixels = torch.from_numpy(start).permute(2, 0, 1)[None].float() / 127.5 - 1
  with torch.no_grad():  # their VAE's mean: the pipeline would draw a sample
    latents = theirs.vae.encode(pixels).latent_dist.mean * theirs.vae.config.scaling_factor
  parts = {k: v for k, v in theirs.components.items() if k != "image_encoder"}
  img2img = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
  img2img.set_progress_bar_config(disable=True)
  expected = img2img(
    [PROMPT] * 2, latents.repeat(2, 1, 1, 1), strength, guidance_scale=2.5,
    num_inference_steps=4, output_type="np",
  ).images  # fmt: skip
  assert_pictures(found, expected)


def assert_pictures(found, expected):
  """Our uint8 pictures are PyTorch's float ones, rounded."""
  found = np.stack([np.asarray(image) for image in found]) / 255
  assert found.shape == expected.shape and expected.std() > 0.05
  assert np.abs(found - expected).max() < 0.55 / 255
