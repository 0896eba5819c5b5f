"""A toy base for `--fast`: the shipped base's kind with random weights."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cc_jax.bases.base import abstract_base
from cc_jax.bases.files import ASSETS
from cc_jax.bases.save import save_module

# Networks of the shipped base, shrunk: what `--fast` trains on.
_TOY = {
  "unet": dict(block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
               attention_head_dim=2, addition_embed_type_num_heads=2),
  "vae": dict(block_out_channels=(4, 8, 8), norm_num_groups=2),
  "text_encoder": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                       num_attention_heads=2, projection_dim=16),
  "image_encoder": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, projection_dim=16, patch_size=16),
}


def toy_base(folder: Path) -> Path:
  """The shipped base's kind with random weights and a few thousand parameters: for `--fast`."""
  if (folder / "model_index.json").exists():
    return folder
  shipped, part = ASSETS / "subjects3d-base", folder.with_name(folder.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(shipped, part, ignore=shutil.ignore_patterns("*.safetensors"))
  for name, changes in _TOY.items():
    file = part / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  rng = np.random.default_rng(0)

  def fill(leaf):  # by numpy: jax would compile an initialiser for every shape
    return jnp.asarray(rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5, leaf.dtype)

  for name, module in abstract_base(part).networks.items():
    definition, state = nnx.split(module)
    save_module(nnx.merge(definition, jax.tree.map(fill, state)), part / name)
  os.replace(part, folder)
  return folder
