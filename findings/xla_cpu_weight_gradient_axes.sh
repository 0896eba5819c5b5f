#!/usr/bin/env bash
# jax 0.10.2 on the CPU: the gradient of a weight costs more where its input has three axes than where it has two.
#
# One would guess that x @ w for x of [batch, tokens, width] compiles to the same products as for its rows in
# one matrix: a reshape moves nothing.
# What happens: in the gradient of w, and only with more than two axes, XLA lays the output's gradient out anew
# (a transposed copy). The copy is fused with what comes before it, so the derivative of the activation
# is computed a second time, in strides.
# Why it matters: an MLP's gradient took twice the processor time (4 x 32 x 9 rows, 128 to 512 to 128, exact gelu,
# no biases). x.reshape(-1, width) before each product avoids it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu PYTHONPATH=$folder python3 - <<'PY'
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

def mlp(x, w1, w2):
  return jnp.sum(jnp.square(jax.nn.gelu(x @ w1, approximate=False) @ w2))

x, w1, w2 = jnp.ones((128, 9, 128)), jnp.full((128, 512), 0.01), jnp.full((512, 128), 0.01)
three = lambda x, w1, w2: mlp(x, w1, w2)
two = lambda x, w1, w2: mlp(x.reshape(-1, 128), w1, w2)
copies, times = [], []
for function in (three, two):
  program = jax.jit(jax.grad(function, (0, 1, 2))).lower(x, w1, w2).compile()
  copies.append(len(re.findall(r"copy\w*fusion[.\d]* = ", program.as_text())))
  took = []
  for _ in range(30):
    began = time.process_time()
    jax.block_until_ready(program(x, w1, w2))
    took.append(time.process_time() - began)
  times.append(1e3 * np.median(took))
print(f"copies: {copies[0]} with three axes, {copies[1]} with two")
print(f"(processor time: {times[0]:.0f} and {times[1]:.0f} ms)")
assert copies == [2, 0], "it has changed"
PY
# copies: 2 with three axes, 0 with two
# (processor time: 35 and 18 ms)
