"""Stable Diffusion as one file in the key format of the original code (CompVis' latent-diffusion).

`describe` finds the architecture from the keys and the tensors' shapes; `entries` says under which
key each parameter of ours lies; `check` insists that nothing else is there.

  model.diffusion_model.*                the UNet
  first_stage_model.*                    the VAE
  cond_stage_model.transformer.*         SD 1.x: CLIP ViT-L, with transformers' own names
  cond_stage_model.model.*               SD 2.x: OpenCLIP ViT-H, with OpenCLIP's names
  conditioner.embedders.0.transformer.*  SDXL: ViT-L;  conditioner.embedders.1.model.*  bigG
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from cc_jax.bases.weights import Convert
from cc_jax.errors import UserError
from cc_jax.models.clip_layers import tower_name
from cc_jax.models.unet_config import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]
Entries = dict[str, tuple[str, Convert | None]]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_PREFIXES = {
  "sd1": {"text_encoder": "cond_stage_model.transformer."},
  "sd2": {"text_encoder": "cond_stage_model.model."},
  "sdxl": {
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
  },
}
# Where the tokenizers are, which no single file holds.
_REPOSITORIES = {
  "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
  "sd2": "stabilityai/stable-diffusion-2-1",
  "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
_HEAD_WIDTH = 64  # of SD 2.x', SDXL's and all of CLIP's attention heads; SD 1.x has 8 heads
_TIME_IDS = 6  # SDXL: original size, crop, target size
_SHOWN = 3

# Keys below the networks' prefixes that are no parameters of them: buffers, a temperature.
_BUFFERS = re.compile(
  r"\.(position_ids|logit_scale|attn_mask)$"
  r"|^first_stage_model\.(loss\.|logvar$|model_ema)"
  r"|^cond_stage_model\..*text_projection(\.weight)?$"  # SD takes CLIP's tokens, not its vector
)

_RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "time_emb_proj": "emb_layers.1",
  "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
  "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"
}  # fmt: skip
_OPEN_CLIP_LAYER = {
  "layer_norm1": "ln_1",
  "layer_norm2": "ln_2",
  "self_attn.out_proj": "attn.out_proj",
  "mlp.fc1": "mlp.c_fc",
  "mlp.fc2": "mlp.c_proj",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a single file is."""

  kind: str  # 'sd1', 'sd2' or 'sdxl'
  configs: dict[str, dict[str, Any]]  # component -> what its config.json would say
  scheduler: dict[str, Any]  # what scheduler_config.json would say, as far as can be known
  repository: str  # whose tokenizers it needs
  predicts: str | None = None  # the prediction type, if a tensor of the file says so


def describe(shapes: Shapes, what: str) -> Checkpoint:
  """The architecture, from the keys and shapes alone.

  Not in any shape: how many heads there are (8 in SD 1.x, 64 channels each elsewhere), the groups
  of the norms (32), the latents' scale, and whether an SD 2.x predicts v (assumed) or the noise.

  Args:
    what: the file's name, for errors.

  Raises:
    UserError: not such a file, or one of a model that we do not have.
  """
  if f"{_UNET}input_blocks.0.0.weight" not in shapes:
    raise UserError(
      f"{what} is no Stable Diffusion checkpoint in the original key format (its first keys: "
      f"{_first(shapes)}); use one of SD 1.x, SD 2.x or SDXL, or a folder in the diffusers layout"
    )
  kinds = [
    kind
    for kind, prefixes in _PREFIXES.items()
    if all(any(name.startswith(p) for name in shapes) for p in prefixes.values())
  ]
  if len(kinds) != 1:
    wanted = " or ".join(" and ".join(p.values()) for p in _PREFIXES.values())
    raise UserError(
      f"{what} holds {'no' if not kinds else 'several kinds of'} text encoder ({wanted}); use a "
      "complete SD 1.x, SD 2.x or SDXL base checkpoint"
    )
  (kind,) = kinds
  if "edm_mean" in shapes:
    raise UserError(f"{what} is a Playground 2.5 (EDM) model, which we do not have; use SDXL")
  try:
    configs = {name: _text_config(kind, name, shapes) for name in _PREFIXES[kind]}
    pooled = configs.get("text_encoder_2", {}).get("projection_dim", 0)
    configs |= {"unet": _unet_config(kind, shapes, pooled), "vae": _vae_config(kind, shapes)}
  except KeyError as error:
    raise UserError(f"{what} lacks {error.args[0]}; get a complete checkpoint") from None
  if configs["unet"]["addition_embed_type"] and kind != "sdxl":
    raise UserError(f"{what} is an unCLIP model, which we do not have; use a text-to-image one")
  predicts = "v_prediction" if "v_pred" in shapes else None
  scheduler = _scheduler_config(kind, predicts, shapes)
  return Checkpoint(kind, configs, scheduler, _REPOSITORIES[kind], predicts)


def entries(
  checkpoint: Checkpoint, component: str, names: Iterable[str], shapes: Shapes
) -> Entries:
  """Our name of every tensor of a component -> (its key in the file, how it becomes ours)."""
  if component == "unet":
    modules = unet_modules(UNetConfig.from_dict(checkpoint.configs["unet"]))
    return {name: (_UNET + _rename(name, modules), None) for name in names}
  if component == "vae":
    modules = _vae_modules(checkpoint.configs["vae"])
    return {
      name: (_VAE + _rename(name, modules), _without_window if ".attentions." in name else None)
      for name in names
    }
  prefix = _PREFIXES[checkpoint.kind][component]
  if prefix.endswith("transformer."):
    return {name: (prefix + key, None) for name, key in _tower_keys(prefix, names, shapes)}
  return {name: _open_clip(name, prefix) for name in names}


def check(
  checkpoint: Checkpoint, used: Collection[str], shapes: Shapes, what: str
) -> tuple[str, ...]:
  """Insists that the file has all that is used, and nothing else of the networks.

  Returns:
    What is not used, in words: copies of the weights, buffers, numbers of the training.

  Raises:
    UserError: keys are missing or not expected; the first are named.
  """
  networks = (_UNET, _VAE, *_PREFIXES[checkpoint.kind].values())
  left = [name for name in shapes if name not in set(used)]
  dropped = _dropped_layer(checkpoint, shapes)
  unexpected = [
    name
    for name in left
    if name.startswith(networks)
    and not _BUFFERS.search(name)
    and not (dropped and name.startswith(dropped))
  ]
  missing = [name for name in used if name not in shapes]
  faults = [
    f"{len(names)} keys {label} ({_first(names)})"
    for label, names in (("missing", missing), ("not expected", unexpected))
    if names
  ]
  if faults:
    raise UserError(
      f"{what} is not the {checkpoint.kind.upper()} checkpoint that its shapes say: "
      f"{'; '.join(faults)}; get it again, or convert it to a folder in the diffusers layout"
    )
  many = [prefix for prefix in ("model_ema.", dropped) if prefix]
  groups = (next((f"{p}*" for p in many if name.startswith(p)), name) for name in left)
  return tuple(dict.fromkeys(groups))


def unet_names(config: UNetConfig, modules: Iterable[str]) -> dict[str, str]:
  """Our paths of the UNet's modules, down to single layers -> the original code's."""
  known = unet_modules(config)
  return {name: _rename(f"{name}.weight", known).removesuffix(".weight") for name in modules}


def unet_modules(config: UNetConfig) -> dict[str, str]:
  """Our module paths (blocks, and what lies outside of them) -> the original code's."""
  modules = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
  }

  def resnet(ours: str, theirs: str) -> None:
    modules.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in _RESNET.items()})

  resnet("mid_block.resnets.0", "middle_block.0")
  resnet("mid_block.resnets.1", "middle_block.2")
  blocks, number = len(config.block_out_channels), 1
  for block, layers in enumerate(config.layers_per_block):
    ours = f"down_blocks.{block}"
    for layer in range(layers):
      resnet(f"{ours}.resnets.{layer}", f"input_blocks.{number}.0")
      modules[f"{ours}.attentions.{layer}"] = f"input_blocks.{number}.1"
      number += 1
    if block < blocks - 1:
      modules[f"{ours}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
      number += 1
  number = 0
  for block, layers in enumerate(reversed(config.layers_per_block)):
    ours, attention = f"up_blocks.{block}", config.up_block_types[block].startswith("CrossAttn")
    for layer in range(layers + 1):
      resnet(f"{ours}.resnets.{layer}", f"output_blocks.{number}.0")
      modules[f"{ours}.attentions.{layer}"] = f"output_blocks.{number}.1"
      number += 1
    if block < blocks - 1:
      place = 2 if attention else 1
      modules[f"{ours}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
  return modules


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
  modules = {}
  blocks = len(config["block_out_channels"])
  for half, direction in (("encoder", "down"), ("decoder", "up")):
    modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
    for index in range(2):
      modules[f"{half}.mid_block.resnets.{index}"] = f"{half}.mid.block_{index + 1}"
    for ours, theirs in _VAE_ATTENTION.items():
      modules[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{theirs}"
    for block in range(blocks):
      # The original numbers the decoder's blocks by resolution, ours are in order of execution.
      ours = f"{half}.{direction}_blocks.{block}"
      theirs = f"{half}.{direction}.{block if direction == 'down' else blocks - 1 - block}"
      for layer in range(config["layers_per_block"] + 1):
        modules[f"{ours}.resnets.{layer}.conv_shortcut"] = f"{theirs}.block.{layer}.nin_shortcut"
        modules[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
      modules[f"{ours}.{direction}samplers.0.conv"] = f"{theirs}.{direction}sample.conv"
  return modules


def _rename(name: str, modules: Mapping[str, str]) -> str:
  """`name` with the longest module path that begins it replaced, if there is one."""
  parts = name.split(".")
  for end in range(len(parts) - 1, 0, -1):
    head = ".".join(parts[:end])
    if head in modules:
      return ".".join([modules[head], *parts[end:]])
  return name


def _tower_keys(prefix: str, names: Iterable[str], shapes: Shapes) -> Iterator[tuple[str, str]]:
  """Our names and the file's in transformers' format, with or without `text_model.` in front."""
  stored = {
    tower_name(name.removeprefix(prefix), "text_model"): name.removeprefix(prefix)
    for name in shapes
    if name.startswith(prefix)
  }
  return ((name, stored.get(name, name)) for name in names)


def _open_clip(name: str, prefix: str) -> tuple[str, Convert | None]:
  """The key of one of our text tower's tensors in OpenCLIP's names, and the way from it to ours."""
  outside = {
    "text_model.embeddings.token_embedding.weight": ("token_embedding.weight", None),
    "text_model.embeddings.position_embedding.weight": ("positional_embedding", None),
    "text_model.final_layer_norm.weight": ("ln_final.weight", None),
    "text_model.final_layer_norm.bias": ("ln_final.bias", None),
    "text_projection.weight": ("text_projection", np.transpose),  # stored for x @ projection
  }
  if name in outside:
    key, convert = outside[name]
    return prefix + key, convert
  layer, module, kind = re.fullmatch(
    r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name
  ).groups()
  block = f"{prefix}transformer.resblocks.{layer}"
  if module in _OPEN_CLIP_LAYER:
    return f"{block}.{_OPEN_CLIP_LAYER[module]}.{kind}", None
  third = ("q_proj", "k_proj", "v_proj").index(module.removeprefix("self_attn."))
  return f"{block}.attn.in_proj_{kind}", lambda array: np.split(array, 3)[third]


def _without_window(array: np.ndarray) -> np.ndarray:
  return array.reshape(array.shape[:2]) if array.ndim > 2 else array


def _unet_config(kind: str, shapes: Shapes, pooled: int) -> dict[str, Any]:
  unet = {name.removeprefix(_UNET): s for name, s in shapes.items() if name.startswith(_UNET)}
  channels, layers, depths = [], [0], [0]
  number = 1
  while True:
    place = f"input_blocks.{number}"
    if f"{place}.0.op.weight" in unet:
      layers.append(0)
      depths.append(0)
    elif f"{place}.0.in_layers.0.weight" in unet:
      if not layers[-1]:
        channels.append(unet[f"{place}.0.out_layers.3.weight"][0])
      layers[-1] += 1
      depths[-1] = _count(unet, f"{place}.1.transformer_blocks.")
    else:
      break
    number += 1
  attention = [depth > 0 for depth in depths]
  # The middle block takes its depth from the last entry, even where that block has no attention.
  depths = [max(depth, 1) for depth in depths]
  depths[-1] = _count(unet, "middle_block.1.transformer_blocks.")
  block = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
  linear = len(unet["middle_block.1.proj_in.weight"]) == 2
  added = "label_emb.0.0.weight" in unet
  width = unet["label_emb.0.0.weight"][1] if added else None
  return {
    "_class_name": "UNet2DConditionModel",
    "sample_size": {"sd1": 64, "sd2": 96, "sdxl": 128}[kind],
    "in_channels": unet["input_blocks.0.0.weight"][1],
    "out_channels": unet["out.2.weight"][0],
    "block_out_channels": channels,
    "layers_per_block": layers,
    "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
    "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": depths,
    "cross_attention_dim": unet[block][1],
    "attention_head_dim": [c // _HEAD_WIDTH for c in channels] if linear else 8,
    "use_linear_projection": linear,
    "addition_embed_type": "text_time" if added else None,
    "addition_time_embed_dim": (width - pooled) // _TIME_IDS if added else None,
    "projection_class_embeddings_input_dim": width,
  }


def _vae_config(kind: str, shapes: Shapes) -> dict[str, Any]:
  blocks = _count(shapes, f"{_VAE}encoder.down.")
  first = [shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"] for i in range(blocks)]
  return {
    "_class_name": "AutoencoderKL",
    "in_channels": shapes[f"{_VAE}encoder.conv_in.weight"][1],
    "out_channels": shapes[f"{_VAE}decoder.conv_out.weight"][0],
    "latent_channels": shapes[f"{_VAE}decoder.conv_in.weight"][1],
    "block_out_channels": [shape[0] for shape in first],
    "layers_per_block": _count(shapes, f"{_VAE}encoder.down.0.block."),
    "down_block_types": ["DownEncoderBlock2D"] * blocks,
    "up_block_types": ["UpDecoderBlock2D"] * blocks,
    "sample_size": {"sd1": 512, "sd2": 768, "sdxl": 1024}[kind],
    "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215,
    "use_quant_conv": f"{_VAE}quant_conv.weight" in shapes,
    "use_post_quant_conv": f"{_VAE}post_quant_conv.weight" in shapes,
    "mid_block_add_attention": f"{_VAE}encoder.mid.attn_1.q.weight" in shapes,
  }


def _text_config(kind: str, component: str, shapes: Shapes) -> dict[str, Any]:
  prefix = _PREFIXES[kind][component]
  if prefix.endswith("transformer."):
    names = [
      "text_model.embeddings.token_embedding.weight",
      "text_model.embeddings.position_embedding.weight",
      "text_model.encoder.layers.0.mlp.fc1.weight",
    ]
    found = dict(_tower_keys(prefix, names, shapes))
    (vocab, width), (length, _), (inner, _) = (shapes[prefix + found[name]] for name in names)
    layers = _count(shapes, prefix + found[names[2]].split("0.mlp")[0])
    named, activation, projection = "CLIPTextModel", "quick_gelu", width
  else:
    vocab, width = shapes[f"{prefix}token_embedding.weight"]
    length = shapes[f"{prefix}positional_embedding"][0]
    inner = shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]
    layers = _count(shapes, f"{prefix}transformer.resblocks.")
    named, activation, projection = "CLIPTextModel", "gelu", width
    if kind == "sdxl":
      named, projection = "CLIPTextModelWithProjection", shapes[f"{prefix}text_projection"][1]
    elif _drops_last(layers):
      layers -= 1
  return {
    "architectures": [named],
    "model_type": "clip_text_model",
    "vocab_size": vocab,
    "hidden_size": width,
    "intermediate_size": inner,
    "num_hidden_layers": layers,
    "num_attention_heads": width // _HEAD_WIDTH,
    "max_position_embeddings": length,
    "hidden_act": activation,
    "projection_dim": projection,
    "bos_token_id": vocab - 2,
    "eos_token_id": vocab - 1,
    "pad_token_id": 1,  # as in the published configs; nothing reads it
  }


def _drops_last(layers: int) -> bool:
  """SD 2.x reads the last layer but one, so that the last of 24 is no part of the model.

  Some tools leave it out when they write the file: then there are 23.
  """
  return layers != 23


def _dropped_layer(checkpoint: Checkpoint, shapes: Shapes) -> str:
  """The prefix of SD 2.x' unused last layer; '' if there is none."""
  if checkpoint.kind != "sd2":
    return ""
  blocks = f"{_PREFIXES['sd2']['text_encoder']}transformer.resblocks."
  kept = checkpoint.configs["text_encoder"]["num_hidden_layers"]
  return f"{blocks}{kept}." if _count(shapes, blocks) > kept else ""


def _scheduler_config(kind: str, predicts: str | None, shapes: Shapes) -> dict[str, Any]:
  """The published models' noise schedule; fine-tunes mark theirs by tensors `v_pred`, `ztsnr`."""
  config = {
    "_class_name": "EulerDiscreteScheduler" if kind == "sdxl" else "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": predicts or ("v_prediction" if kind == "sd2" else "epsilon"),
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
  }
  if kind == "sdxl":  # the others leave it to each sampler
    config["timestep_spacing"] = "leading"
  if "ztsnr" in shapes:
    config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
  return config


def _count(names: Iterable[str], prefix: str) -> int:
  """How many numbers follow `prefix`."""
  return len(
    {
      name[len(prefix) :].split(".")[0]
      for name in names
      if name.startswith(prefix) and name[len(prefix) : len(prefix) + 1].isdigit()
    }
  )


def _first(names: Iterable[str]) -> str:
  names = sorted(names)
  return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
