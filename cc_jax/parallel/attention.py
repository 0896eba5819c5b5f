"""The attention of a program on a mesh."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from cc_jax.models.attention_kinds import AttentionKernels, choose_kernels
from cc_jax.parallel.mesh import batch_sharding


def mesh_kernels(
  asked: str, mesh: Mesh | AbstractMesh | None, *, dtype: Any, training: bool
) -> AttentionKernels:
  """What `asked` ('auto', 'xla', 'cudnn', 'pallas') means on these devices, there or planned for.

  `mesh` None is JAX's first device. Raises UserError: see `choose_kernels`.
  """
  if isinstance(mesh, AbstractMesh):
    device = None
  else:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  places = {}
  if mesh is not None and mesh.size > 1:
    places = dict(mesh=mesh, batch_axes=batch_sharding(mesh).spec[0], head_axis="tensor")
  return choose_kernels(asked, device, dtype=dtype, training=training, **places)
