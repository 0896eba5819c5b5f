#!/usr/bin/env bash
# jax 0.10.2 on the CPU under glibc: "keep freed memory" settings miss most of the memory.
#
# One would guess that mallopt(M_MMAP_MAX, 0) and a large M_TRIM_THRESHOLD stop the C library from
# returning the temporary buffers of a program to the kernel after every call.
# What happens: XLA allocates them in threads of its own, which have arenas that end at 64 MiB. A larger
# buffer does not fit, is mapped all the same, and its pages are faulted in at every call. Only
# M_ARENA_MAX = 1 as well, before the CPU client exists, stops that.
# Why it matters: the page faults took a sixth of the processor time of a small training.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$folder/faults.py" <<'PY'
import ctypes, resource, sys

libc = ctypes.CDLL("libc.so.6")
SETTINGS = [(-4, 0), (-1, 2**31 - 1), (-2, 2**26)]  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
if sys.argv[1] == "one_arena":
  SETTINGS.append((-8, 1))  # M_ARENA_MAX
for setting in SETTINGS:
  libc.mallopt(*setting)

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 2)  # a program for two devices runs in XLA's threads
mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
rows = jax.NamedSharding(mesh, jax.P("data"))
x = jax.device_put(jnp.ones((2 * 65536, 512)), rows)  # 128 MiB on each device
w = jnp.eye(512)[:, :8]
step = jax.jit(lambda x: (jnp.tanh(x).T @ x[:, :8], jnp.sin(x) @ w))  # temporary: 128 MiB and more
faults = []
for _ in range(20):
  jax.block_until_ready(step(x))
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[-5]) // 4)
PY
run() { JAX_PLATFORMS=cpu PYTHONPATH=$folder python3 "$folder/faults.py" "$1"; }
many=$(run many_arenas) one=$(run one_arena)
echo "page faults a call: $many with arenas of threads, $one with one arena"
[ "$many" -gt 20000 ] && [ "$one" -lt 2000 ]
# page faults a call: 131082 with arenas of threads, 0 with one arena
