#!/usr/bin/env bash
# diffusers 0.42.1: kohya's DoRA loads as a plain LoRA, and the DoRA files it writes itself do not load.
#
# One would guess that load_lora_weights reads DoRA in kohya's format, as it reads LoRA, or raises an error;
# and that it reads what convert_state_dict_to_kohya made.
# What happens: the magnitudes (dora_scale) are dropped with a warning, and the rest is used as a LoRA. The
# converter does not rename the magnitudes to dora_scale, and loading its result ends in a ValueError.
# Why it matters: a DoRA without its magnitudes gives other pictures, and one that was saved for other
# programs lacks the name they look for. In diffusers' own names a DoRA is read whole.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 torch==2.13.0
PYTHONPATH=$folder python3 - <<'PY'
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn

def parts(tensors):  # what load_lora_weights makes of them
  return sorted(name.split("to_q")[1] for name in StableDiffusionPipeline.lora_state_dict(tensors)[0])

layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
shapes = {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2), "alpha": (), "dora_scale": (4, 1)}
read = parts({f"lora_unet_{layer}.{name}": torch.ones(shape) for name, shape in shapes.items()})
print("of kohya's DoRA it reads:", *read)
assert len(read) == 2 and not any("magnitude" in name or "dora" in name for name in read), "it has changed"

model = nn.ModuleDict({"to_q": nn.Linear(4, 4)})
inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), model)
prefix = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
own = {prefix + name: tensor for name, tensor in get_peft_model_state_dict(model).items()}
print("of its own DoRA it reads:", *parts(dict(own)))
converted = convert_state_dict_to_kohya(dict(own))
try:
  parts(dict(converted))
except ValueError as error:
  print("of its own, converted:", "ValueError:", str(error).split(":")[0])
else:
  raise AssertionError("it has changed")
PY
# of kohya's DoRA it reads: _lora.down.weight _lora.up.weight
# of its own DoRA it reads: .lora_A.weight .lora_B.weight .lora_magnitude_vector
# of its own, converted: ValueError: The following keys have not been correctly renamed
