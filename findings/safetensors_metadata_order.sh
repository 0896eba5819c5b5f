#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors and metadata give files of different bytes.
#
# One would guess that a format made for safe exchange is deterministic, so that a file's SHA-256
# says whether two files hold the same.
# What happens: the metadata's entries are written in another order by every process (and call).
# Why it matters: a checksum of an adapter or LoRA with metadata identifies the file, not its content;
# hash the tensors themselves, or write one metadata entry only.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" safetensors==0.8.0 numpy==2.4.6
PYTHONPATH=$folder python3 - <<'PY'
import hashlib
import numpy as np
from safetensors.numpy import save

def digests(metadata):
  return {hashlib.sha256(save({"a": np.zeros(4)}, metadata=metadata)).hexdigest() for _ in range(20)}

counts = [len(digests(metadata)) for metadata in (None, {"a": "1"}, dict.fromkeys("abcdefgh", "1"))]
print("different files of 20: without metadata, one entry, eight entries:", counts)
assert counts[:2] == [1, 1] and counts[2] > 1, "it has changed"
PY
# different files of 20: without metadata, one entry, eight entries: [1, 1, 20]
