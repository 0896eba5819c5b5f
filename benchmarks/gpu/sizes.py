"""What is measured: the shipped architectures with random weights, or tiny ones of their form."""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from cc_jax.bases.files import ASSETS

NAMES = {"sd15": "stable-diffusion-v1-5", "sdxl": "stable-diffusion-xl-base-1.0"}
VISION = ASSETS / "architectures" / "IP-Adapter" / "models" / "image_encoder"
# What replaces the published numbers in a tiny base: two levels, of 32 and 64 channels.
_TINY = {
  "unet": {"sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 1},
  "vae": {"block_out_channels": [32, 32], "layers_per_block": 1, "sample_size": 16,
          "down_block_types": ["DownEncoderBlock2D"] * 2,
          "up_block_types": ["UpDecoderBlock2D"] * 2},
  "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "projection_dim": 32},
  "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 2, "projection_dim": 32, "image_size": 28},
  "sd15": {"cross_attention_dim": 32, "attention_head_dim": 4,
           "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
           "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
  "sdxl": {"cross_attention_dim": 64, "attention_head_dim": [2, 4],
           "transformer_layers_per_block": [1, 2], "addition_time_embed_dim": 8,
           "projection_class_embeddings_input_dim": 6 * 8 + 32,
           "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
           "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
}  # fmt: skip


def architecture(base: str, *, tiny: bool) -> tuple[Path, Path]:
  """Folders of config.json files: the base's, and the image encoder's."""
  folder = ASSETS / "architectures" / NAMES[base]
  if not tiny:
    return folder, VISION
  new = Path(tempfile.mkdtemp(prefix=f"tiny-{base}-"))
  for file in folder.rglob("*.json"):
    changes = dict(_TINY.get(file.parent.name.removesuffix("_2"), {}))
    if file.parent.name == "unet":
      changes |= _TINY[base]
    _write(new / file.relative_to(folder), json.loads(file.read_text()) | changes)
  vision = json.loads((VISION / "config.json").read_text())
  _write(new / "vision" / "config.json", vision | _TINY["vision"])
  return new, new / "vision"


def _write(path: Path, values: Mapping[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(values))


def training_config(batch: int, *, tiny: bool) -> ml_collections.ConfigDict:
  """configs/sd15.py on one device, with architectures in place of weights."""
  config = importlib.import_module("configs.sd15").get_config()
  folder, vision = architecture("sd15", tiny=tiny)
  config.base, config.encoder.image_encoder = str(folder), str(vision)
  config.train.batch_size = batch
  config.mesh.cpu_devices = 1
  if tiny:
    config.data.image_size = 16
    config.encoder.update(image_layers=(1, 2), width=32, depth=1, heads=2, visual_queries=4,
                          textual_queries=4, s_words=2)
    config.injection.location_width = 4
  return config


class RandomWeights:
  """Arrays for shapes: of numpy, because JAX would compile an initialiser for every shape.

  They repeat one buffer of normal numbers, whose spread is that of a kernel's fan-in, to the next
  power of two.
  """

  def __init__(self, seed: int = 0, size: int = 2**20):
    self._normal = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    self._buffers: dict[tuple, np.ndarray] = {}

  def __call__(self, path: Any, shape: Any) -> jax.Array:
    """An array on the device. `shape` has shape and dtype, and perhaps a sharding."""
    name = jax.tree_util.keystr(path).rstrip("']").rpartition(".")[2].rpartition("'")[2]
    if not np.issubdtype(shape.dtype, np.floating) and shape.dtype != jax.numpy.bfloat16:
      raise TypeError(f"{path} is {shape.dtype}; only weights are random")
    spread, middle = 2.0**-5, 0.0
    if name == "scale":
      middle = 1.0
    elif len(shape.shape) > 1:
      spread = 2.0 ** round(-math.log2(math.prod(shape.shape[:-1])) / 2)
    key = spread, middle, str(shape.dtype)
    if key not in self._buffers:
      self._buffers[key] = (middle + spread * self._normal).astype(shape.dtype)
    values = np.resize(self._buffers[key], shape.shape)
    return jax.device_put(values, getattr(shape, "sharding", None))


def peak_gib() -> float | None:
  """The most memory that the device has held, as its allocator says; None where it does not."""
  statistics = jax.local_devices()[0].memory_stats() or {}
  return statistics["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in statistics else None


def growing_batches(first: int, most: int, fits: Callable[[int], bool]) -> None:
  """Calls `fits(batch)`, which measures, for 4 times as many until one does not fit; then its half.
  """
  batch = first
  while batch <= most and fits(batch):
    batch *= 4
  if first < batch // 2 <= most // 2:
    fits(batch // 2)


def is_out_of_memory(error: BaseException) -> bool:
  words = str(error)
  return "RESOURCE_EXHAUSTED" in words or "out of memory" in words.lower()
