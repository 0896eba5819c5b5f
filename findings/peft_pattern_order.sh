#!/usr/bin/env bash
# peft 0.21.2: alpha_pattern counts in the order of its keys, and saving sorts them.
#
# One would guess that an adapter acts after from_pretrained as it did in training.
# What happens: of several keys that fit a module the first one counts, but save_pretrained writes the keys
# in alphabetical order. With {"to_q": 5, "down_blocks.0.to_q": 7} a module is trained with an alpha of 5
# and used with 7.
# Why it matters: the weights are read right, no warning is given, and the adapter is a different one. Let
# no two keys fit the same module.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" peft==0.21.2 transformers==5.23.0 torch==2.13.0
PYTHONPATH=$folder python3 - "$folder/adapter" <<'PY'
import sys

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

class Model(nn.Module):
  def __init__(self):
    super().__init__()
    self.down_blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 4)})])

def alpha(model):
  return model.base_model.model.down_blocks[0]["to_q"].scaling["default"]  # of rank 1

found = {}
for keys in (("to_q", "down_blocks.0.to_q"), ("down_blocks.0.to_q", "to_q")):
  pattern = {key: {"to_q": 5, "down_blocks.0.to_q": 7}[key] for key in keys}
  trained = get_peft_model(Model(), LoraConfig(r=1, target_modules=["to_q"], alpha_pattern=pattern))
  trained.save_pretrained(sys.argv[1])
  found[keys] = alpha(trained), alpha(PeftModel.from_pretrained(Model(), sys.argv[1]))
  print(pattern, "trained with %g, loaded with %g" % found[keys])
assert list(found.values()) == [(5, 7), (7, 7)], "it has changed"
PY
# {'to_q': 5, 'down_blocks.0.to_q': 7} trained with 5, loaded with 7
# {'down_blocks.0.to_q': 7, 'to_q': 5} trained with 7, loaded with 7
