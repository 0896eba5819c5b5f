#!/usr/bin/env bash
# safetensors 0.8.0: with framework="numpy" it reads bfloat16, but not float8.
#
# One would guess that it reads both or neither: numpy has neither type of its own, and ml_dtypes, which
# brings bfloat16 to numpy, brings the float8 types as well.
# What happens: a bfloat16 tensor comes back; a float8_e4m3fn one raises an AttributeError, since it is
# looked for in numpy alone, even where ml_dtypes is imported.
# Why it matters: float8 checkpoints are common by now; without torch one has to read the bytes oneself.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
PYTHONPATH=$folder python3 - "$folder/two.safetensors" <<'PY'
import json, struct, sys

import ml_dtypes  # so that numpy knows the types
import numpy as np
from safetensors import safe_open

values = np.array([1, -2, 0.5, 448], np.float32)
parts = {"BF16": values.astype(ml_dtypes.bfloat16), "F8_E4M3": values.astype(ml_dtypes.float8_e4m3fn)}
header, data = {}, b""
for dtype, array in parts.items():
  end = len(data) + array.nbytes
  header[dtype] = {"dtype": dtype, "shape": [4], "data_offsets": [len(data), end]}
  data += array.tobytes()
text = json.dumps(header).encode()
with open(sys.argv[1], "wb") as file:
  file.write(struct.pack("<Q", len(text)) + text + data)

with safe_open(sys.argv[1], framework="numpy") as file:
  print("BF16:", file.get_tensor("BF16"))
  try:
    file.get_tensor("F8_E4M3")
  except AttributeError as error:
    print("F8_E4M3: AttributeError:", error)
  else:
    raise AssertionError("it has changed")
PY
# BF16: [1 -2 0.5 448]
# F8_E4M3: AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'
