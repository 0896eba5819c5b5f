"""How LoRA files name the modules of a base and the factors of a change.

  lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight, .lora_up.weight, .alpha         kohya
  lora_te_text_model_encoder_layers_0_..., lora_te1_..., lora_te2_...                      kohya
  unet.down_blocks.0....attn1.to_q.lora_A.weight, .lora_B.weight                           PEFT
  unet.down_blocks.0....attn1.processor.to_q_lora.down.weight, .up.weight                  old
  text_encoder.text_model....q_proj.lora_linear_layer.down.weight, .up.weight              old
"""

import re
from collections.abc import Mapping
from pathlib import Path

from cc_jax.errors import UserError
from cc_jax.models.clip_layers import tower_name

# Ends of keys, and which factor they are; `mid` is the kernel of a convolution in three factors.
_FACTORS = (
  (re.compile(r"(\.lora_down|\.lora_A(\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight$"),
   "down"),
  (re.compile(r"(\.lora_up|\.lora_B(\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight$"), "up"),
  (re.compile(r"\.lora_mid\.weight$"), "mid"),
  (re.compile(r"(_lora|\.lora)?\.alpha$"), "alpha"),
)  # fmt: skip
_KOHYA = {
  "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
  "lora_te2_": "text_encoder_2",
}  # fmt: skip
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def split_key(key: str, path: Path) -> tuple[tuple[str, str], str]:
  """A key -> ((component, module), factor). Kohya's modules keep their underscores."""
  ends = ((pattern.search(key), factor) for pattern, factor in _FACTORS)
  match, factor = next((end for end in ends if end[0]), (None, ""))
  if match is None:
    raise UserError(
      f"{path} has the tensor {key}, which is none of a LoRA (down, up, alpha); LoHa, LoKr, DoRA "
      "and full differences are not implemented"
    )
  module, old = key[: match.start()], match.group().startswith("_lora")
  for prefix, component in _KOHYA.items():
    if module.startswith(prefix):
      return (component, module.removeprefix(prefix)), factor
  module = module.removeprefix("base_model.model.")
  component, _, rest = module.partition(".")
  if component not in _COMPONENTS:  # old files of a UNet alone
    component, rest = "unet", module
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
    for spelling in (name, other_names.get(name, name)):
      # Underscores for dots cannot be undone by rules alone ("to_out_0"), but by looking it up.
      assert spellings.setdefault(spelling.replace(".", "_"), name) == name, (component, spelling)
  return spellings
