"""Stable Diffusion as one file in the key format of the original code (CompVis' latent-diffusion).

`entries` says under which key each parameter of ours is stored; `check` insists that nothing else
is there. The architecture is that of cc_jax.bases.ldm_configs.

  model.diffusion_model.*                the UNet
  first_stage_model.*                    the VAE
  cond_stage_model.transformer.*         SD 1.x: CLIP ViT-L, with transformers' own names
  cond_stage_model.model.*               SD 2.x: OpenCLIP ViT-H, with OpenCLIP's names
  conditioner.embedders.0.transformer.*  SDXL: ViT-L;  conditioner.embedders.1.model.*  bigG
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from cc_jax.bases.tensor_files import Convert
from cc_jax.errors import UserError, first_names
from cc_jax.models.clip_layers import tower_name
from cc_jax.models.unet_config import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]
Entries = dict[str, tuple[str, Convert | None]]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {
  "sd1": {"text_encoder": "cond_stage_model.transformer."},
  "sd2": {"text_encoder": "cond_stage_model.model."},
  "sdxl": {
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
  },
}

# Keys below the networks' prefixes that are no parameters of ours: buffers, a temperature, CLIP's
# other half, and the projection of towers of which only the tokens are taken.
_OTHERS = re.compile(
  r"\.(position_ids|logit_scale|attn_mask)$"
  r"|^first_stage_model\.(loss\.|logvar$|model_ema)"
  r"|^cond_stage_model\..*text_projection(\.weight)?$"
  r"|^conditioner\.embedders\.0\..*text_projection(\.weight)?$"
  r"|\.(vision_model|visual|visual_projection)\."
)
# What is told as one of the things that are not used, instead of tensor by tensor.
_GROUPS = re.compile(
  r"^(model_ema|control_model|denoiser|first_stage_model\.(loss|model_ema))\."
  r"|^.*?\.(vision_model|visual)\.|^lora_\w+?_(?=\w)"
)
# Tensors that say how the model was trained; they are read.
MARKS = ("v_pred", "ztsnr")

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


def entries(
  checkpoint: Checkpoint, component: str, names: Iterable[str], shapes: Shapes
) -> Entries:
  """Our name of every tensor of a component -> (its key in the file, how it becomes ours)."""
  if component == "unet":
    modules = unet_modules(UNetConfig.from_dict(checkpoint.configs["unet"]))
    return {name: (UNET + _rename(name, modules), None) for name in names}
  if component == "vae":
    modules = _vae_modules(checkpoint.configs["vae"])
    return {
      name: (VAE + _rename(name, modules), _without_window if ".attentions." in name else None)
      for name in names
    }
  prefix = PREFIXES[checkpoint.kind][component]
  if prefix.endswith("transformer."):
    return {name: (prefix + key, None) for name, key in tower_keys(prefix, names, shapes)}
  return {name: _open_clip(name, prefix, shapes) for name in names}


def check(
  checkpoint: Checkpoint, used: Collection[str], shapes: Shapes, what: str
) -> tuple[str, ...]:
  """Insists that the file has all that is used, and nothing else of the networks.

  Returns:
    What is not used, in words: copies of the weights, buffers, numbers of the training.

  Raises:
    UserError: keys are missing or not expected; the first are named.
  """
  networks = (UNET, VAE, *PREFIXES[checkpoint.kind].values())
  known = {*used, *MARKS}
  left = [name for name in shapes if name not in known]
  dropped = _dropped_layer(checkpoint, shapes)
  unexpected = [
    name
    for name in left
    if name.startswith(networks)
    and not _OTHERS.search(name)
    and not (dropped and name.startswith(dropped))
  ]
  missing = [name for name in used if name not in shapes]
  faults = [
    f"{len(names)} keys {label} ({first_names(sorted(names))})"
    for label, names in (("missing", missing), ("not expected", unexpected))
    if names
  ]
  if faults:
    raise UserError(
      f"{what} is not the {checkpoint.kind.upper()} checkpoint that its shapes say: "
      f"{'; '.join(faults)}; get it again, or convert it to a folder in the diffusers layout"
    )
  return tuple(dict.fromkeys(_group(name, dropped) for name in left))


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


def tower_keys(prefix: str, names: Iterable[str], shapes: Shapes) -> Iterator[tuple[str, str]]:
  """Our names and the file's in transformers' format, with or without `text_model.` in front."""
  stored = {
    tower_name(name.removeprefix(prefix), "text_model"): name.removeprefix(prefix)
    for name in shapes
    if name.startswith(prefix)
  }
  return ((name, stored.get(name, name)) for name in names)


def projection_key(prefix: str, shapes: Shapes) -> tuple[str, Convert | None]:
  """Where a file has OpenCLIP's projection, and the way to a linear layer's weight.

  OpenCLIP stores it for x @ projection; some tools write it as the linear layer that it is.
  """
  linear = f"{prefix}text_projection.weight"
  return (linear, None) if linear in shapes else (f"{prefix}text_projection", np.transpose)


def _open_clip(name: str, prefix: str, shapes: Shapes) -> tuple[str, Convert | None]:
  """The key of one of our text tower's tensors in OpenCLIP's names, and the way from it to ours."""
  if name == "text_projection.weight":
    return projection_key(prefix, shapes)
  outside = {
    "text_model.embeddings.token_embedding.weight": ("token_embedding.weight", None),
    "text_model.embeddings.position_embedding.weight": ("positional_embedding", None),
    "text_model.final_layer_norm.weight": ("ln_final.weight", None),
    "text_model.final_layer_norm.bias": ("ln_final.bias", None),
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


def _group(name: str, dropped: str) -> str:
  if dropped and name.startswith(dropped):
    return f"{dropped}*"
  found = _GROUPS.search(name)
  return f"{found[0]}*" if found else name


def _dropped_layer(checkpoint: Checkpoint, shapes: Shapes) -> str:
  """The prefix of SD 2.x' unused last layer; '' if there is none."""
  if checkpoint.kind != "sd2":
    return ""
  blocks = f"{PREFIXES['sd2']['text_encoder']}transformer.resblocks."
  kept = checkpoint.configs["text_encoder"]["num_hidden_layers"]
  return f"{blocks}{kept}." if count(shapes, blocks) > kept else ""


def count(names: Iterable[str], prefix: str) -> int:
  """How many numbers follow `prefix`."""
  number = re.compile(re.escape(prefix) + r"(\d[^.]*)")
  return len({found[1] for found in map(number.match, names) if found})
