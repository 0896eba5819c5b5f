"""The signed distance of an individual and its ray march, pure JAX; the renderer adds the batch.

A table entry is either a Python float, a constant of the program (one jit per class on a CPU), or a
traced scalar (tables gathered by class on accelerators). Both use the same formulas; terms whose
entry is the Python float 0 are skipped, which does not change the value.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from data_pipeline.subjects3d import shapes

_FAR = 1e3  # larger than every distance
_TETRAHEDRON = np.array([(1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1), (0, 0, 0)], np.float32)


def _zero(value) -> bool:
  return isinstance(value, float) and value == 0.0


def rows_of_class(class_id: int, wide, tall, ratio) -> list[list]:
  """The table of one class with its constants as Python floats; proportions are traced scalars."""
  rows = []
  for base_and_changes in shapes.TABLES[class_id].tolist():
    row = []
    for base, *changes in base_and_changes:
      value = base
      for change, amount in zip(changes, (wide, tall, ratio), strict=True):
        value = value + change * amount if change else value
      row.append(value)
    rows.append(row)
  return rows


def padded_tables() -> np.ndarray:
  """[classes, P, 17, 4]: all tables with P rows; the solids of the added rows are far away."""
  num_rows = max(len(t) for t in shapes.TABLES)
  out = np.zeros((len(shapes.TABLES), num_rows, *shapes.TABLES[0].shape[1:]), np.float32)
  scale, centre = shapes.FIELDS.index("sx"), shapes.FIELDS.index("cy")
  out[:, :, scale : scale + 3, 0] = 1
  out[:, :, centre, 0] = _FAR
  for c, table in enumerate(shapes.TABLES):
    out[c, : len(table)] = table
  return out


def rows_of_table(table: jax.Array, wide, tall, ratio) -> list[jax.Array]:
  """The same from a gathered table [P, 17, 4]: all solids as one row of 17 arrays [P, 1]."""
  values = table[..., 0] + table[..., 1] * wide + table[..., 2] * tall + table[..., 3] * ratio
  return list(values.T[..., None])


def _tilt(a, b, angle):
  if isinstance(angle, float):
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
  else:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
  return a * cos + b * sin, b * cos - a * sin


def primitive(x, y, z, row):
  """Distance (a lower bound where scales differ) to one solid.

  Args:
    x, y, z: points, arrays of one shape. row: the 17 numbers of `shapes.FIELDS`.
  """
  cx, cy, cz, rx, rz, sx, sy, sz, bx, bz, h, r, rnd, taper, ring, mirror, _ = row
  if isinstance(mirror, float):
    x = jnp.abs(x) if mirror >= 1 else x
    z = jnp.abs(z) if mirror >= 2 else z
  else:
    x, z = jnp.where(mirror >= 1, jnp.abs(x), x), jnp.where(mirror >= 2, jnp.abs(z), z)
  x, y, z = x - cx, y - cy, z - cz
  if not _zero(rx):
    y, z = _tilt(y, z, rx)
  if not _zero(rz):
    y, x = _tilt(y, x, rz)
  smallest = 1.0
  if not all(isinstance(s, float) and s == 1.0 for s in (sx, sy, sz)):
    x, y, z = x / sx, y / sy, z / sz
    smallest = jnp.minimum(jnp.minimum(sx, sy), sz)
  if not _zero(ring):
    bent = (jnp.sqrt(y * y + z * z) - ring, y * 0.0, x)
    if isinstance(ring, float):
      x, y, z = bent
    else:
      x, y, z = (jnp.where(ring > 0, new, old) for new, old in zip(bent, (x, y, z), strict=True))
  shrink = 1.0
  if not _zero(taper):
    half = jnp.maximum(h, 1e-6)
    shrink = 1.0 - taper * jnp.clip(y * (0.5 / half) + 0.5, 0.0, 1.0)
    slope = taper * jnp.maximum(jnp.maximum(bx, bz), r) * (0.5 / half)
    # The side is steep: distances shrink by its cosine.
    smallest = smallest * lax.rsqrt(1.0 + slope * slope)
  qx = x if _zero(bx) else jnp.maximum(jnp.abs(x) - bx * shrink, 0.0)
  qz = z if _zero(bz) else jnp.maximum(jnp.abs(z) - bz * shrink, 0.0)
  qy = y if _zero(h) and _zero(r) else jnp.abs(y) - h
  if _zero(r):
    qy = qy if _zero(h) else jnp.maximum(qy, 0.0)
    d = jnp.sqrt(qx * qx + qy * qy + qz * qz)
  else:
    radial = jnp.sqrt(qx * qx + qz * qz) - r * shrink
    outside = jnp.sqrt(jnp.maximum(radial, 0.0) ** 2 + jnp.maximum(qy, 0.0) ** 2)
    # Without a radius the inside is as flat as in the branch above.
    inside = jnp.minimum(jnp.maximum(radial, qy), 0.0)
    d = outside + (inside if isinstance(r, float) else jnp.where(r > 0, inside, 0.0))
  return (d - rnd) * smallest


def _gathered(rows) -> bool:
  return not isinstance(rows[0], list)


def distance(x, y, z, rows, no_hat):
  """Signed distance to the individual at points [H*W].

  Args:
    rows: of `rows_of_class` or `rows_of_table`.
    no_hat: 0, or a large number that moves the hat away.
  """
  if _gathered(rows):
    return jnp.min(primitive(x, y, z, rows) + (rows[-1] == shapes.HAT) * no_hat, axis=0)
  d = None
  for row in rows:
    d_row = primitive(x, y, z, row) + (no_hat if row[-1] == shapes.HAT else 0.0)
    d = d_row if d is None else jnp.minimum(d, d_row)
  return d


def nearest_material(x, y, z, rows, no_hat):
  """(distance, material) of the nearest solid; arguments as of `distance`."""
  if _gathered(rows):
    each = primitive(x, y, z, rows) + (rows[-1] == shapes.HAT) * no_hat
    return jnp.min(each, axis=0), rows[-1][jnp.argmin(each, axis=0), 0]
  d = material = None
  for row in rows:
    d_row = primitive(x, y, z, row) + (no_hat if row[-1] == shapes.HAT else 0.0)
    if d is None:
      d, material = d_row, jnp.full_like(d_row, row[-1])
    else:
      material = jnp.where(d_row < d, row[-1], material)
      d = jnp.minimum(d, d_row)
  return d, material


def march(origin, direction, start, end, rows, no_hat, *, steps: int):
  """Sphere tracing. Returns (t, d) of the point of each ray with the smallest distance per depth.

  Args:
    origin: 3 scalars. direction: 3 arrays [H*W], unit length.
    start, end: scalars, the depths at which the bounding sphere begins and ends.
  """
  ox, oy, oz = origin
  dx, dy, dz = direction

  def step(_, carry):
    t, best, best_t = carry
    d = distance(ox + t * dx, oy + t * dy, oz + t * dz, rows, no_hat)
    relative = d / t
    nearer = relative < best
    return jnp.minimum(t + d, end), jnp.where(nearer, relative, best), jnp.where(nearer, t, best_t)

  t0 = jnp.full_like(dx, start)
  _, best, best_t = lax.fori_loop(0, steps, step, (t0, jnp.full_like(dx, _FAR), t0))
  return best_t, best * best_t


def normal_and_material(x, y, z, rows, no_hat, eps):
  """Unit normal (tetrahedron differences) and material of the nearest solid at points [H*W].

  A loop, so that XLA computes each tap once: unrolled, it would be fused into every channel of the
  picture and repeated there.
  """
  offsets = jnp.asarray(_TETRAHEDRON)

  def tap(i, carry):
    nx, ny, nz, _ = carry
    ex, ey, ez = offsets[i, 0], offsets[i, 1], offsets[i, 2]
    d, material = nearest_material(x + eps * ex, y + eps * ey, z + eps * ez, rows, no_hat)
    return nx + ex * d, ny + ey * d, nz + ez * d, material

  zero = jnp.zeros_like(x)
  nx, ny, nz, material = lax.fori_loop(0, 5, tap, (zero, zero, zero, zero))
  length = lax.rsqrt(nx * nx + ny * ny + nz * nz + 1e-12)
  return (nx * length, ny * length, nz * length), material
