"""How LoRA files name the modules of a base and the factors of a change.

  lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight, .lora_up.weight, .alpha         kohya
  lora_te_text_model_encoder_layers_0_..., lora_te1_..., lora_te2_...                      kohya
  lora_te1_encoder_layers_0_...               diffusers' export to kohya's under transformers 5
  unet.down_blocks.0....attn1.to_q.lora_A.weight, .lora_B.weight                       diffusers
  base_model.model.down_blocks.0....attn1.to_q.lora_A.weight, .lora_B.weight                PEFT
  diffusion_model.input_blocks.1.1....attn1.to_q.lora_up.weight, .lora_down.weight       ComfyUI
  text_encoders.clip_l.transformer.text_model....q_proj.lora_up.weight                   ComfyUI
  unet.down_blocks.0....attn1.processor.to_q_lora.down.weight, .up.weight                    old
  text_encoder.text_model....q_proj.lora_linear_layer.down.weight, .up.weight                old

kohya's modules may have the UNet's original names, as for SDXL. Beside or instead of down and up:
.lora_mid.weight, .lora_magnitude_vector (PEFT's DoRA), .dora_scale (kohya's), and LyCORIS'
.hada_w1_a, ... and .lokr_w1, ...
"""

import re
from collections.abc import Mapping
from pathlib import Path

from cc_jax.errors import UserError
from cc_jax.models.clip_layers import tower_name

# Ends of keys, and which factor they are; `mid` is the kernel of a convolution in three factors.
FACTORS = (
  (re.compile(r"(\.lora_down|\.lora_A(\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
   "down"),
  (re.compile(r"(\.lora_up|\.lora_B(\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"), "up"),
  (re.compile(r"\.lora_mid\.weight$"), "mid"),
  (re.compile(r"(_lora|\.lora)?\.alpha$"), "alpha"),
  (re.compile(r"\.lora_magnitude_vector(\.\w+)*$"), "lora_magnitude_vector"),
  (re.compile(r"\.dora_scale$"), "dora_scale"),
  *((re.compile(rf"\.{name}$"), name) for name in (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2",
    "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2")),
)  # fmt: skip
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# Beginnings of keys, the longest of a kind first; kohya's have underscores for dots.
_PREFIXES = {
  "lora_unet_": "unet", "lycoris_": "unet", "lora_te_": "text_encoder",
  "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
  "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
  "model.diffusion_model.": "unet", "diffusion_model.": "unet",
  "text_encoders.clip_l.transformer.": "text_encoder",
  "text_encoders.clip_h.transformer.": "text_encoder",
  "text_encoders.clip_g.transformer.": "text_encoder_2",
}  # fmt: skip
PEFT = "base_model.model."  # how PEFT's own files begin every key
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_key(key: str, path: Path) -> tuple[tuple[str, str], str]:
  """A key -> ((component, module), factor). Kohya's modules keep their underscores.

  Args:
    path: the file's, for errors, and because PEFT writes one network alone: the folder's name says
      which, or its modules do.

  Raises:
    UserError: no factor of a change that we have.
  """
  ends = ((pattern.search(key), factor) for pattern, factor in FACTORS)
  match, factor = next((end for end in ends if end[0]), (None, ""))
  if match is None:
    raise UserError(
      f"{path} has the tensor {key}, which is none of a LoRA, LoHa, LoKr or DoRA; full differences "
      "and biases are not implemented"
    )
  module, old = key[: match.start()].removeprefix(PEFT), match.group().startswith("_lora")
  prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), "")
  rest = module.removeprefix(prefix)
  if prefix.endswith("_"):
    # diffusers exports a DoRA's vector with a dot too many.
    return (_PREFIXES[prefix], rest.replace(".", "_")), factor
  component = _PREFIXES.get(prefix) or _only_component(rest, path)
  rest = rest.replace(".processor.", ".")
  parent, _, last = rest.rpartition(".")
  if component != "unet":
    rest = tower_name(f"{parent}.{_OLD_TEXT[last]}" if last in _OLD_TEXT else rest, "text_model")
  elif last == "to_out" and old:
    rest += ".0"
  return (component, rest), factor


def module_spellings(
  component: str, tensors: Mapping[str, tuple[int, ...]], other_names: Mapping[str, str]
) -> dict[str, str]:
  """Every way in which files write a module's name -> our name of it."""
  modules = [
    name.removesuffix(".weight") for name, shape in tensors.items()
    if name.endswith(".weight") and len(shape) >= 2
  ]  # fmt: skip
  spellings = {name: name for name in modules}
  for name in modules:
    # transformers 5 has no text_model. in front of a text encoder's names.
    for spelling in (name, other_names.get(name, name), name.removeprefix("text_model.")):
      # Underscores for dots cannot be undone by rules alone ("to_out_0"), but by looking it up.
      for written in (spelling, spelling.replace(".", "_")):
        assert spellings.setdefault(written, name) == name, (component, written)
  return spellings


def _only_component(module: str, path: Path) -> str:
  """Of a file that holds one network's modules only, and so does not name it."""
  if path.parent.name in COMPONENTS:
    return path.parent.name
  return "text_encoder" if tower_name(module, "text_model").startswith("text_model.") else "unet"
