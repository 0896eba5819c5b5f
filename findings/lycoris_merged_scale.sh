#!/usr/bin/env bash
# lycoris-lora 4.1.3: merging a LoHa or LoKr adapter applies alpha / rank twice.
#
# One would guess that merge_to changes a layer's weight by what the adapter adds to it before merging, as
# it does for a LoRA.
# What happens: for LoHa and LoKr the forward pass scales the change by alpha / rank once, but the merged
# weight has the factor twice. They agree only where alpha is the rank.
# Why it matters: alpha = rank / 2 is a common choice, and the merged model then has half the effect of the
# adapter as it was trained and watched.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" lycoris-lora==4.1.3 torch==2.13.0
PYTHONPATH=$folder python3 - <<'PY'
import logging

import torch
from lycoris import create_lycoris
from torch import nn

logging.disable(logging.WARNING)

@torch.no_grad()
def merged_to_forward(algo, alpha):
  torch.manual_seed(0)
  model = nn.Sequential(nn.Linear(16, 16, bias=False))
  before = model[0].weight.clone()
  adapter = create_lycoris(model, linear_dim=2, linear_alpha=alpha, algo=algo, factor=2)
  adapter.apply_to()
  for weight in adapter.parameters():
    nn.init.normal_(weight)
  forward = model(torch.eye(16)).T - before
  adapter.restore()
  adapter.merge_to()
  merged = model[0].weight - before
  ratio = (merged.norm() / forward.norm()).item()
  assert torch.allclose(merged, ratio * forward, atol=1e-4)
  return round(ratio, 4)

found = {algo: [merged_to_forward(algo, alpha) for alpha in (2, 1)] for algo in ("lora", "loha", "lokr")}
print("merged / forward, rank 2, alpha 2 and 1:", found)
assert found == {"lora": [1, 1], "loha": [1, 0.5], "lokr": [1, 0.5]}, "it has changed"
PY
# merged / forward, rank 2, alpha 2 and 1: {'lora': [1.0, 1.0], 'loha': [1.0, 0.5], 'lokr': [1.0, 0.5]}
