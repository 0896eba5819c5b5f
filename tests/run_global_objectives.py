"""The contrastive losses on virtual devices: python tests/run_global_objectives.py OUT.npz.

OUT.npz holds '<case>/<backend>/<tensor>' for loss, metrics and gradients, and what was read
in the compiled programs at the size of a pod.
"""

import functools
import re
import sys
from pathlib import Path

if __name__ == "__main__":
  sys.path.insert(0, str(Path(__file__).parent))
  import conftest  # noqa: F401  (the environment)
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from cc_jax.objectives import infonce  # noqa: E402
from cc_jax.objectives.contrast import NAIVE_BACKEND, ContrastiveBackend  # noqa: E402
from cc_jax.objectives.cscl import cscl  # noqa: E402
from cc_jax.objectives.macl import SCALINGS, macl  # noqa: E402
from cc_jax.objectives.pair_scaling import PairLoss, clipped  # noqa: E402
from cc_jax.training.accumulation import merge_microbatches, split_microbatches
from cc_jax.training.contrastive import Embeddings

DEVICES = 8
N, L, Q, D, E = 40, 2, 2, 5, 4  # 5 rows a device
TILE = {"tiled": 12, "ring": 3}  # neither divides its columns, 40 and 5
IDS = np.arange(N) // 3  # samples of a subject lie on one device, and on two
IDS[-4:] = -1
POD = dict(N=32768, L=16, D=768)  # E = D

AXES = ("data", "fsdp")


@functools.cache
def mesh_of(*shape):
  return jax.make_mesh(shape, (*AXES, "tensor"), (AxisType.Auto,) * 3)


def placed(*spec, shape=(8, 1, 1)):
  return NamedSharding(mesh_of(*shape), P(*spec))


def features():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(L, N, Q, D)) + 0.3
  z_plus = 0.7 * z + rng.normal(size=z.shape)  # so that accuracy is between 0 and 1
  embed = rng.normal(size=(N, E)) + 0.3
  return tuple(a.astype(np.float32) for a in (z, z_plus, embed))


def cases():
  """name -> (mesh, loss of (z, z+, embed, ids) by a backend)."""
  for i, scaling in enumerate(SCALINGS):
    options = dict(
      temperature=0.2,
      soft_temperature=0.15,
      scaling=scaling,
      symmetric=i % 2 == 0,  # on for soft_target, whose normaliser the columns need too
      pooling=("per_token", "mean")[i % 3 == 0],
    )
    mesh = (2, 2, 2) if scaling == "soft_target" else (8, 1, 1)
    yield scaling, mesh, lambda backend, z, y, e, ids, o=options: macl(
      z, y, e, subject_ids=ids, backend=backend, **o
    )
  yield "cscl", (8, 1, 1), lambda backend, z, y, e, ids: cscl(
    z[0, :, 0], y[0, :, 0], temperature=0.2, subject_ids=ids, backend=backend
  )


def numbers():
  """Loss, metrics and gradients of all cases by all backends."""
  z, y, embed = features()
  for name, mesh, loss in cases():
    for kind in ("naive", "tiled", "ring"):
      backend = NAIVE_BACKEND
      if kind != "naive":
        backend = ContrastiveBackend(kind, TILE[kind], mesh_of(*mesh), AXES)

      @jax.jit
      def values(z, y, embed, ids, backend=backend, loss=loss):
        of = jax.value_and_grad(lambda *a: loss(backend, *a, ids), (0, 1, 2), has_aux=True)
        (value, metrics), gradients = of(z, y, embed)
        return {"loss": value, **metrics, **dict(zip(("d_z", "d_z_plus", "d_embed"), gradients))}

      layered, flat = placed(None, AXES, shape=mesh), placed(AXES, shape=mesh)
      inputs = jax.device_put((z, y, embed, IDS), (layered, layered, flat, flat))
      for key, value in values(*inputs).items():
        yield f"{name}/{kind}/{key}", np.asarray(value)


def naive_by_scan(z, y, embed, ids):
  """The naive loss with less memory than the oracle: a layer's logits at a time; S once.

  The gradient keeps what autodiff keeps (no remat); rows are sharded over the devices.
  """
  def rows(x):
    return jax.lax.with_sharding_constraint(x, placed(AXES))

  n, rule = len(ids), PairLoss(0.07, "inverse")
  s, allowed = rows(clipped(infonce.cosine_matrix(embed, embed))), infonce.allowed_pairs(ids, n)

  def layer(_, features):
    cosines = rows(infonce.cosine_matrix(*features))
    logits = rule.logits(cosines, s, jnp.eye(n, dtype=bool))
    return None, infonce.cross_entropy(logits, allowed).mean()

  return jax.lax.scan(layer, None, (z[:, :, 0], y[:, :, 0]))[1].mean()


def programs():
  """Memory of MACL's value and gradient at the size of a pod: compiled, not run."""
  n, layers, width = POD["N"], POD["L"], POD["D"]

  def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed(*spec))

  z = array((layers, n, 1, width), jnp.float32, None, AXES)
  inputs = z, z, array((n, width), jnp.float32, AXES), array((n,), jnp.int32, AXES)
  losses = {"naive": naive_by_scan}
  for kind in ("tiled", "ring"):
    backend = ContrastiveBackend(kind, 1024, mesh_of(8, 1, 1), AXES)
    losses[kind] = lambda z, y, e, ids, backend=backend: macl(
      z, y, e, temperature=0.07, subject_ids=ids, backend=backend
    )[0]
  for kind, loss in losses.items():
    shardings = placed(), (z.sharding, z.sharding)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=shardings)
    compiled = compiled.lower(*inputs).compile()
    yield f"memory/{kind}", compiled.memory_analysis().temp_size_in_bytes
    shapes = {
      tuple(int(k) for k in shape.split(","))
      for shape in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    }
    # A side of the whole batch, or of a device's share, against another.
    flat = [tuple(k for k in shape if k > 1) for shape in shapes]
    pairs = [s for s in flat if len(s) == 2 and s[0] == n // DEVICES and s[1] != width]
    yield f"tile/{kind}", max(pairs, key=np.prod)
    yield f"largest/{kind}", max(np.prod(shape) for shape in shapes)


def cutting():
  """The collectives of a batch that goes through a network in parts."""
  x = jax.ShapeDtypeStruct((64, 6), jnp.float32, sharding=placed(AXES))

  def parts(x):
    seen = jax.lax.map(lambda part: jnp.tanh(part), split_microbatches(x, 4))
    return merge_microbatches(Embeddings(visual_cls=seen)).visual_cls

  text = jax.jit(parts, out_shardings=x.sharding).lower(x).compile().as_text()
  yield "cutting/collectives", len(re.findall(r"all-|collective-|reduce-scatter", text))


def main(out: str) -> None:
  jax.config.update("jax_num_cpu_devices", DEVICES)
  results = {**dict(programs()), **dict(cutting())}
  jax.config.update("jax_disable_most_optimizations", True)  # compiles much, computes little
  np.savez(out, **results, **dict(numbers()))


if __name__ == "__main__":
  main(sys.argv[1])
