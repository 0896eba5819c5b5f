"""Five steps of SGD on meshes of 8 virtual devices: python tests/run_sharded.py BASE OUT.

Everything that mixes samples is on: CSCL, MACL, subject masks, condition dropout, EMA; each mesh
has another backend of the contrastive losses, one has microbatches. In float64: the comparison is
about what the partitioner makes of the program, not about rounding sums in another order. The
adapter is moved away from its start, where closed gates would make most gradients zero.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import in_float64  # noqa: E402, F401  (before anything reads jnp.float32)
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402

from cc_jax.bases.base import load_base  # noqa: E402
from cc_jax.customcontrast.build import build_customcontrast  # noqa: E402
from cc_jax.models.params import flatten  # noqa: E402
from cc_jax.parallel.distributed import set_cpu_devices  # noqa: E402
from cc_jax.parallel.mesh import make_mesh, shard_batch  # noqa: E402
from cc_jax.parallel.rules import abstract_params, init_sharded, param_sharding_fn, shard_params  # noqa: E402
from cc_jax.training import step  # noqa: E402
from cc_jax.training.checkpoint import Checkpoints, jsonable  # noqa: E402
from cc_jax.training.setup import adapter_configs, make_step_context, step_seed  # noqa: E402

SIZE, STEPS = 16, 5
# data, fsdp, tensor: objective.contrast, microbatches, train.remat_*.
MESHES = {
  (1, 1, 1): ("naive", 1, "none"),
  (8, 1, 1): ("naive", 1, "none"),
  (1, 8, 1): ("ring", 1, "full"),
  (2, 2, 2): ("tiled", 2, "none"),
}


def configure(base, sizes, contrast, microbatches, remat):
  data, fsdp, tensor = sizes
  return tiny.tiny_config(
    base,
    mesh__data=data,
    mesh__fsdp=fsdp,
    mesh__tensor=tensor,
    mesh__cpu_devices=8,
    train__batch_size=SIZE,
    train__grad_accum_steps=microbatches,
    train__remat_unet=(remat,),
    train__remat_text=remat,
    train__learning_rate=0.01,
    train__ema=0.05,
    objective__contrast=contrast,
    objective__tile=3,
    objective__lambda_cscl=1.0,
    objective__lambda_macl=1.0,
    objective__cscl_temperature=0.3,
    objective__macl_temperature=0.3,
    objective__drop_text=0.2,
    objective__drop_image=0.2,
    objective__drop_both=0.2,
  )


def steps(config, base, definition, trainable, frozen, mesh):
  """(the state after the last step, arrays to compare, the compiled program's text)."""
  state = shard_params(step.init_state(trainable, config), mesh)
  frozen = shard_params(frozen, mesh)
  context = make_step_context(config, definition, base)
  batches = tiny.batches(base.tokenizers[0], SIZE)
  arrays, compiled = {}, None
  for number in range(STEPS):
    batch = next(batches)
    batch["subject_id"][-3:] = -1
    batch = shard_batch(batch, mesh)
    if compiled is None:
      seed = shard_params(step_seed(config), mesh)
      compiled = step.make_train_step(context, mesh, state, frozen)
      compiled = compiled.lower(state, frozen, batch, seed).compile()
    state, metrics = compiled(state, frozen, batch, seed)
    if number == 0:
      trace = jax.device_get(state.opt_state.trace)  # now, since the state is donated
      arrays |= {f"gradient/{key}": value for key, value in trace.items()}
    arrays |= {f"metric/{number}/{key}": value for key, value in metrics.items()}
  arrays |= {f"parameter/{key}": value for key, value in state.trainable.items()}
  arrays |= {f"EMA/{key}": value for key, value in state.ema.items()}
  return state, jax.device_get(arrays), compiled.as_text()


def main(folder: str, out: Path) -> None:
  jax.config.update("jax_disable_most_optimizations", True)
  configs = {sizes: configure(folder, sizes, *settings) for sizes, settings in MESHES.items()}
  config = configs[1, 8, 1]
  set_cpu_devices(config.mesh, SIZE)
  meshes = {sizes: make_mesh(c.mesh, SIZE) for sizes, c in configs.items()}
  assert all(mesh.devices.shape == sizes for sizes, mesh in meshes.items())
  # Created on one of the meshes, as training does; all use the same values.
  mesh = meshes[1, 8, 1]
  base = load_base(
    folder, dtype=jnp.float64, param_dtype=jnp.float64, sharding=param_sharding_fn(mesh)
  )
  parts = build_customcontrast(
    base, *adapter_configs(config), dtype=jnp.float64, transform=init_sharded(mesh)
  )
  definition, trainable, frozen = parts[0], *jax.device_get(parts[1:])
  rng = np.random.default_rng(7)
  trainable = {  # queries far apart: where tokens are nearly equal, the keys' gradients cancel
    key: value + (1 if "queries" in key else 0.3) * rng.normal(size=value.shape)
    for key, value in sorted(trainable.items())
  }
  states = {}
  for sizes, mesh in meshes.items():
    states[sizes], arrays, text = steps(
      configs[sizes], base, definition, trainable, frozen, mesh
    )
    name = "x".join(map(str, sizes))
    np.savez(out / f"{name}.npz", **arrays)
    (out / f"{name}.hlo").write_text(text)
  parameters = {**frozen, **trainable}
  (out / "shapes.json").write_text(json.dumps([x.shape for x in parameters.values()]))

  # A checkpoint does not depend on how its arrays were sharded.
  saved = states[8, 1, 1]
  record = {"base_hash": base.hash, "config": jsonable(config), "telemetry": {}}
  checkpoints = Checkpoints(out / "checkpoints", keep=1)
  checkpoints.save(STEPS, saved, record)
  checkpoints.wait()
  before = {key: np.asarray(value) for key, value in flatten(saved).items()}
  for sizes in ((2, 2, 2), (1, 1, 1)):
    state = abstract_params(saved, meshes[sizes])
    restored, _ = checkpoints.restore(state, base_hash=base.hash, config=config)
    same = [
      value.sharding == wanted.sharding and np.asarray(value).tobytes() == before[key].tobytes()
      for (key, value), wanted in zip(flatten(restored).items(), jax.tree.leaves(state))
    ]
    sharded = sum(not value.is_fully_replicated for value in jax.tree.leaves(restored))
    print("restored", *sizes, all(same), sharded, flush=True)
  checkpoints.close()


if __name__ == "__main__":
  main(sys.argv[1], Path(sys.argv[2]))
