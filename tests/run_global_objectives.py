"""The three implementations on virtual devices: python tests/run_global_objectives.py OUT.npz.

Writes '<case>/<implementation>/<tensor>' for loss, metrics and gradients. Every rule is compiled
once per implementation; cases are its inputs.
"""

import os
import sys
from pathlib import Path

DEVICES = 8
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_disable_most_optimizations", True)

import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from cc_jax.objectives.contrast import NAIVE, Contrast  # noqa: E402
from cc_jax.objectives.cscl import cscl  # noqa: E402
from cc_jax.objectives.macl import SCALINGS, macl  # noqa: E402

N, L, Q, D, E = 40, 2, 2, 5, 4  # 5 rows a device
TILE = {"tiled": 12, "ring": 3}  # neither divides its columns, 40 and 5
IDS = np.arange(N) // 3  # pairs of a subject lie on one device and on two
IDS[-4:] = -1


def mesh_of(*shape):
  return jax.make_mesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)


MESHES = {"811": mesh_of(8, 1, 1), "222": mesh_of(2, 2, 2)}
AXES = ("data", "fsdp")


def features():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(L, N, Q, D)) + 0.3
  z_plus = 0.7 * z + rng.normal(size=z.shape)  # so that some rows find their own and some do not
  embed = rng.normal(size=(N, E)) + 0.3
  return tuple(a.astype(np.float32) for a in (z, z_plus, embed))


def cases():
  """name -> (mesh, loss of (z, z+, embed, ids) by an implementation)."""
  for i, scaling in enumerate(SCALINGS):
    options = dict(
      temperature=0.2,
      soft_temperature=0.15,
      scaling=scaling,
      symmetric=i % 2 == 0,  # on for soft_target, whose normaliser the columns need too
      pooling=("per_token", "mean")[i % 3 == 0],
    )
    yield scaling, "811", lambda how, z, y, e, ids, o=options: macl(
      z, y, e, subject_ids=ids, how=how, **o
    )
  for mesh in MESHES:
    yield f"cscl{mesh}", mesh, lambda how, z, y, e, ids: cscl(
      z[0, :, 0], y[0, :, 0], temperature=0.2, subject_ids=ids, how=how
    )


def main(out: str) -> None:
  results = {}
  arrays = features()
  for name, mesh, loss in cases():
    for kind in ("naive", "tiled", "ring"):
      def values(z, y, embed, ids, kind=kind, mesh=mesh, loss=loss):
        how = NAIVE if kind == "naive" else Contrast(kind, TILE[kind], MESHES[mesh], AXES)
        def of(z, y, embed):
          return loss(how, z, y, embed, ids)
        (value, metrics), gradients = jax.value_and_grad(of, (0, 1, 2), has_aux=True)(z, y, embed)
        return {"loss": value, **metrics, **dict(zip(("d_z", "d_z_plus", "d_embed"), gradients))}

      def put(x, *spec, mesh=mesh):
        return jax.device_put(x, NamedSharding(MESHES[mesh], P(*spec)))

      z, y, embed = arrays
      inputs = [put(z, None, AXES), put(y, None, AXES), put(embed, AXES), put(IDS, AXES)]
      for key, value in jax.jit(values)(*inputs).items():
        results[f"{name}/{kind}/{key}"] = np.asarray(value)
  np.savez(out, **results)


if __name__ == "__main__":
  main(sys.argv[1])
