#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1: one instruction of a compiled program's text may take several lines.
#
# One would guess that compiled.as_text() has an instruction a line, as everything that XLA makes itself has;
# log readers, FLOP counters and cost models split it at line ends.
# What happens: Pallas' splash attention passes kernel_metadata to its custom call as JSON with line ends in it,
# and they stand in the text as they are. One of the lines begins with "}}", which ends a
# computation for a reader of lines: what follows in that computation is not seen.
# Why it matters: such a reader loses a part of the training step, and with it time, memory traffic and FLOPs,
# exactly where somebody turned attention into a kernel.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
python3 -m pip install -q --no-deps --target "$folder" libtpu==0.0.42.1
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 PYTHONPATH=$folder python3 - 2> "$folder/log" <<'PY'
import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
everywhere = jax.NamedSharding(mesh, jax.P())
heads, tokens, width = 2, 1024, 128
mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
attend = kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
x = jax.ShapeDtypeStruct((heads, tokens, width), "bfloat16", sharding=everywhere)
text = jax.jit(attend).lower(x, x, x).compile().as_text()
lines = text.splitlines()
start = next(n for n, line in enumerate(lines) if "kernel_metadata" in line)
end = next(n for n in range(start, len(lines)) if "backend_config" in lines[n] and n >= start)
closing = [line for line in lines[start : start + 20] if line.startswith("}}")]
print("the call's text goes on after its first line:", "backend_config" not in lines[start])
print("a line that begins with }}:", bool(closing))
assert closing and "backend_config" not in lines[start], "it has changed"
PY
# the call's text goes on after its first line: True
# a line that begins with }}: True
