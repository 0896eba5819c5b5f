"""One training step on virtual devices: python tests/run_sharded.py DEVICES BASE OUT.npz.

Everything that mixes samples is on: CSCL, MACL, subject masks, condition dropout, EMA. The adapter
is moved away from its start, where closed gates would make most gradients zero.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import tiny  # noqa: E402

from cc_jax import hub, optimizer, sharding, step, train  # noqa: E402
from cc_jax.assemble import assemble  # noqa: E402

SIZE = 16


def main(devices: int, base: str, out: str) -> None:
  config = tiny.tiny_config(
    base,
    mesh__cpu_devices=devices,
    train__batch_size=SIZE,
    train__ema=0.05,
    objective__lambda_cscl=1.0,
    objective__lambda_macl=1.0,
    objective__cscl_temperature=0.3,
    objective__macl_temperature=0.3,
    objective__drop_text=0.2,
    objective__drop_image=0.2,
    objective__drop_both=0.2,
  )
  jax.config.update("jax_disable_most_optimizations", True)
  sharding.set_cpu_devices(config.mesh, SIZE)
  mesh = sharding.make_mesh(config.mesh, SIZE)
  assert mesh.size == devices
  # SGD whose state is the gradient.
  optimizer.make_optimizer = lambda settings: optax.trace(decay=0.0)

  base = hub.load_base(base)
  definition, trainable, frozen = assemble(base, *train.networks(config))
  rng = np.random.default_rng(7)  # a start at which no scalar's gradient is a sum that cancels
  trainable = {
    # Queries far apart: where tokens are nearly equal, the keys' gradients cancel.
    key: np.asarray(value) + (1 if "queries" in key else 0.3) * rng.normal(size=value.shape)
    for key, value in sorted(trainable.items())
  }
  trainable = {key: value.astype(np.float32) for key, value in trainable.items()}
  method = train.make_method(config, definition, base)
  state = sharding.put_replicated(step.init_state(trainable, config), mesh)
  frozen = sharding.put_replicated(frozen, mesh)
  batch = next(tiny.batches(base.tokenizers[0], SIZE))
  batch["subject_id"][-3:] = -1
  batch = sharding.put_batch(batch, mesh)
  compiled = step.make_train_step(method, mesh, state, frozen)
  compiled = compiled.lower(state, frozen, batch).compile()
  state, metrics = compiled(state, frozen, batch)
  np.savez(
    out,
    **{f"gradient/{key}": value for key, value in state.opt_state.trace.items()},
    **{f"ema/{key}": value for key, value in state.ema.items()},
    **{f"metric/{key}": value for key, value in metrics.items()},
  )
  Path(f"{out}.hlo").write_text(compiled.as_text())


if __name__ == "__main__":
  main(int(sys.argv[1]), *sys.argv[2:])
