"""The ten backgrounds, one picture at a time, in pure JAX.

Everything has low spatial frequency: noisy grounds, small stars and flowers would take up the
capacity of a small VAE for nothing. The ground is a plane in perspective; its horizon rises with
the camera.
"""

import jax.numpy as jnp
from jax import lax

from data_pipeline.subjects3d import factors


def _hash(ix, iy, seed):
  """Integer hash -> [0, 1); noise from sines costs more and differs between devices."""
  h = (
    ix.astype(jnp.uint32) * jnp.uint32(0x8DA6B343)
    ^ iy.astype(jnp.uint32) * jnp.uint32(0xD8163841)
    ^ seed
  )
  h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
  h = (h ^ (h >> 12)) * jnp.uint32(0x297A2D39)
  return (h ^ (h >> 15)).astype(jnp.float32) * (1.0 / 2**32)


def _cell(x):
  floor = jnp.floor(x)
  return floor.astype(jnp.int32), x - floor


def _noise(x, y, seed):
  """Value noise in [-1, 1], smooth over cells of size 1."""
  ix, fx = _cell(x)
  iy, fy = _cell(y)
  fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
  a, b = _hash(ix, iy, seed), _hash(ix + 1, iy, seed)
  c, d = _hash(ix, iy + 1, seed), _hash(ix + 1, iy + 1, seed)
  return 2 * (a + (b - a) * fx + (c - a) * fy + (a - b - c + d) * fx * fy) - 1


def _uniform(seed, k: int):
  return _hash(jnp.int32(k), jnp.int32(7 * k + 1), seed)


def _step(edge, value, width):
  """0 below the edge, 1 above it, with a linear ramp of `width`."""
  return jnp.clip((value - edge) / width + 0.5, 0.0, 1.0)


def _rgb(r, g, b):
  return (r / 255.0, g / 255.0, b / 255.0)


def _mix(a, b, w):
  return tuple(p + (q - p) * w for p, q in zip(a, b, strict=True))


def _times(a, w):
  return tuple(p * w for p in a)


class _View:
  """Picture and ground coordinates of one background."""

  def __init__(self, u, v, elevation, seed, pixel):
    self.u, self.v, self.seed, self.pixel = u, v, seed, pixel
    self.horizon = 0.40 - 0.5 * elevation + 0.06 * (_uniform(seed, 1) - 0.5)
    self.below = jnp.maximum(v - self.horizon, 0.0)
    self.depth = 0.3 / (self.below + 0.06)  # 0.3 at the bottom, 5 at the horizon
    self.shift = 8.0 * (_uniform(seed, 2) - 0.5)
    self.gx = (u - 0.5) * self.depth * 3.0 + self.shift
    self.gz = self.depth * 2.0 + 8.0 * _uniform(seed, 3)
    self.near = jnp.clip(self.below * 2.2, 0.0, 1.0)  # 0 at the horizon: the texture fades there

  def ground(self, sky, ground):
    return _mix(sky, ground, _step(self.horizon, self.v, 1.5 * self.pixel))

  def patches(self, frequency, k=11):
    """Soft patches on the ground, fading towards the horizon."""
    noise = _noise(self.gx * frequency, self.gz * frequency, self.seed + k)
    return noise * (0.25 + 0.75 * self.near)

  def sky(self, top, bottom, clouds=0.0):
    color = _mix(top, bottom, jnp.clip(self.v / 0.4, 0.0, 1.0))
    if clouds:
      puff = _noise(self.u * 3.2 + self.shift, self.v * 7.0, self.seed + 5)
      color = _mix(color, (1.0, 1.0, 1.0), clouds * jnp.clip(1.6 * puff, 0.0, 1.0))
    return color

  def ridge(self, frequency, height, k=21):
    """Mask of what is below a hilly skyline that rises over the horizon."""
    noise = _noise(self.u * frequency + self.shift, self.u * 0 + 0.5, self.seed + k)
    return _step(self.horizon - height * (0.6 + 0.5 * noise), self.v, 1.5 * self.pixel)


def _grass(w):
  sky = w.sky(_rgb(96, 168, 245), _rgb(205, 230, 255), clouds=0.8)
  n = w.patches(1.3)
  green = _mix(_rgb(70, 150, 44), _rgb(104, 186, 58), 0.5 + 0.5 * n)
  return w.ground(sky, _mix(_rgb(128, 196, 92), green, w.near))


def _beach(w):
  sky = w.sky(_rgb(122, 196, 255), _rgb(214, 240, 255), clouds=0.4)
  # Sea, foam, wet sand, sand: bands parallel to the horizon, with a long wave.
  wave = 0.012 * _noise(w.u * 3 + w.shift, w.u * 0, w.seed + 4)
  shore = w.horizon + 0.13 + wave
  sea = _mix(_rgb(18, 110, 190), _rgb(40, 190, 205), jnp.clip(w.below / 0.13, 0, 1))
  n = w.patches(1.2)
  sand = _mix(_rgb(226, 200, 142), _rgb(250, 230, 178), 0.5 + 0.5 * n)
  sand = _mix(_rgb(196, 164, 108), sand, _step(shore + 0.07, w.v, 0.06))
  foam = _mix(sea, (1.0, 1.0, 1.0), _step(shore - 0.012, w.v, 0.015))
  return w.ground(sky, _mix(foam, sand, _step(shore + 0.02, w.v, 0.02)))


def _snow(w):
  sky = w.sky(_rgb(168, 190, 216), _rgb(222, 230, 240))
  # Firs: a triangle wave of slowly varying height.
  ix, fx = _cell(w.u * 7.0 + w.shift)
  height = (0.07 + 0.09 * _hash(ix, ix * 0, w.seed)) * (1.0 - jnp.abs(2 * fx - 1.0))
  firs = _step(w.horizon - 0.03 - height, w.v, 2 * w.pixel)
  sky = _mix(sky, _rgb(38, 84, 78), firs)
  n = w.patches(0.9)
  return w.ground(sky, _mix(_rgb(208, 220, 240), _rgb(252, 253, 255), 0.55 + 0.5 * n))


def _desert(w):
  sky = w.sky(_rgb(246, 190, 110), _rgb(255, 232, 176))
  sky = _mix(sky, _rgb(206, 124, 62), w.ridge(2.2, 0.12))
  ripple = jnp.sin(w.gz * 5.0 + 2.2 * _noise(w.gx * 0.8, w.gz * 0.8, w.seed + 9))
  ripple = ripple * (0.2 + 0.8 * w.near)
  return w.ground(sky, _mix(_rgb(212, 128, 56), _rgb(240, 166, 84), 0.5 + 0.5 * ripple))


def _sea(w):
  sky = w.sky(_rgb(140, 205, 250), _rgb(232, 246, 255), clouds=0.9)
  swell = jnp.sin(w.gz * 4.5 + 3.0 * _noise(w.gx * 0.9, w.gz * 0.9, w.seed + 9))
  swell = swell * (0.25 + 0.75 * w.near)
  water = _mix(_rgb(8, 78, 150), _rgb(36, 142, 204), 0.5 + 0.5 * swell)
  water = _mix(water, _rgb(170, 226, 245), 0.75 * _step(0.86, swell, 0.2))
  return w.ground(sky, water)


def _night(w):
  sky = w.sky(_rgb(10, 8, 44), _rgb(52, 34, 96))
  mx, my = 0.15 + 0.7 * _uniform(w.seed, 4), 0.12 + 0.04 * _uniform(w.seed, 5)
  r = jnp.sqrt((w.u - mx) ** 2 + (w.v - my) ** 2)
  sky = _mix(sky, _rgb(150, 140, 200), 0.45 * jnp.clip(1 - r / 0.22, 0, 1))
  sky = _mix(sky, _rgb(255, 248, 214), _step(-0.075, -r, 1.5 * w.pixel))
  # A few large soft stars on a coarse grid.
  ix, fx = _cell(w.u * 6.0 + w.shift)
  iy, fy = _cell(w.v * 6.0)
  star = _hash(ix, iy, w.seed + 3)
  dot = jnp.clip(1.5 - 9.0 * jnp.sqrt((fx - 0.3 - 0.4 * star) ** 2 + (fy - 0.5) ** 2), 0, 1)
  sky = _mix(sky, _rgb(255, 250, 220), dot * (star > 0.55))
  n = w.patches(0.8)
  ground = _mix(_rgb(36, 30, 66), _rgb(62, 54, 100), 0.5 + 0.5 * n)
  return w.ground(sky, _mix(ground, _rgb(92, 84, 140), 0.5 * (1 - w.near)))


def _brick_wall(w):
  floor_line = w.horizon + 0.2
  rows = (w.v - floor_line) / 0.085
  iy, fy = _cell(rows)
  ix, fx = _cell(w.u / 0.19 + w.shift + 0.5 * (iy & 1))
  edge = jnp.minimum(jnp.minimum(fx, 1 - fx) * 0.19, jnp.minimum(fy, 1 - fy) * 0.085)
  brick = _mix(_rgb(150, 58, 42), _rgb(192, 88, 64), _hash(ix, iy, w.seed))
  wall = _mix(_rgb(222, 208, 192), brick, _step(0.008, edge, 1.2 * w.pixel))
  n = w.patches(0.9)
  ground = _mix(_rgb(134, 132, 130), _rgb(166, 164, 160), 0.5 + 0.5 * n)
  return _mix(wall, ground, _step(floor_line, w.v, 1.5 * w.pixel))


def _wooden_floor(w):
  skirting = w.horizon + 0.1
  wall = _mix(_rgb(226, 216, 196), _rgb(244, 238, 222), jnp.clip(w.v / 0.3, 0, 1))
  wall = _mix(wall, _rgb(255, 255, 255), _step(skirting - 0.055, w.v, 1.5 * w.pixel))
  ix, fx = _cell((w.u - 0.5) * w.depth * 4.6 + w.shift)
  iz, fz = _cell(w.gz * 0.35 + _hash(ix, ix * 0, w.seed))
  plank = _mix(_rgb(142, 84, 40), _rgb(186, 120, 64), _hash(ix, iz, w.seed + 1))
  plank = _times(plank, 1.0 + 0.06 * _noise(w.gx * 6.0, w.gz * 0.8, w.seed + 2) * w.near)
  seam = _step(-0.06, -jnp.minimum(fx, 1 - fx), 5.0 * w.pixel * w.depth)
  seam = jnp.maximum(seam, _step(-0.03, -fz, 0.06))
  floor = _mix(plank, _rgb(82, 44, 20), 0.8 * seam * (0.3 + 0.7 * w.near))
  return _mix(wall, floor, _step(skirting, w.v, 1.5 * w.pixel))


def _road(w):
  sky = w.sky(_rgb(150, 176, 206), _rgb(222, 226, 230))
  # A skyline of blocks.
  ix, _ = _cell(w.u * 8.0 + w.shift)
  tower = 0.06 + 0.16 * _hash(ix, ix * 0, w.seed)
  gray = _mix(_rgb(120, 124, 140), _rgb(160, 160, 170), _hash(ix, ix * 0 + 1, w.seed))
  sky = _mix(sky, gray, _step(w.horizon - tower, w.v, 1.5 * w.pixel))
  asphalt = _mix(_rgb(58, 60, 64), _rgb(84, 86, 90), 0.5 + 0.5 * w.patches(1.2))
  across = (w.u - 0.5) / (w.below + 0.02) + 0.5 * (_uniform(w.seed, 6) - 0.5)
  soft = 1.5 * w.pixel / (w.below + 0.02)
  dash = _step(-0.07, -jnp.abs(across), soft) * _step(0.0, jnp.sin(w.gz * 4.0), 0.4)
  road = _mix(asphalt, (0.96, 0.96, 0.94), dash)
  road = _mix(road, _rgb(250, 196, 40), _step(-0.11, -jnp.abs(jnp.abs(across) - 1.25), soft))
  kerb = _mix(_rgb(150, 146, 140), _rgb(176, 172, 164), 0.5 + 0.5 * w.patches(1.0))
  return w.ground(sky, _mix(road, kerb, _step(1.5, jnp.abs(across), soft)))


def _flower_meadow(w):
  sky = w.sky(_rgb(132, 190, 250), _rgb(226, 240, 255), clouds=0.5)
  sky = _mix(sky, _rgb(70, 132, 74), w.ridge(1.6, 0.09))
  ground = _mix(_rgb(46, 122, 44), _rgb(84, 158, 60), 0.5 + 0.5 * w.patches(1.0))
  # A flower in most cells of a coarse grid on the ground: a soft disc of petals, its centre yellow.
  ix, fx = _cell(w.gx * 3.0)
  iz, fz = _cell(w.gz * 3.0)
  a, b, kind = _hash(ix, iz, w.seed), _hash(ix, iz, w.seed + 1), _hash(ix, iz, w.seed + 2)
  r = jnp.sqrt((fx - 0.35 - 0.3 * a) ** 2 + (fz - 0.35 - 0.3 * b) ** 2)
  petals = _mix(_rgb(255, 96, 160), _rgb(255, 255, 255), (kind > 0.4) * 1.0)
  petals = _mix(petals, _rgb(255, 210, 30), (kind > 0.7) * 1.0)
  soft = 4.0 * w.pixel * w.depth
  flower = _step(-0.32, -r, soft) * jnp.clip(w.near * 2.4 - 0.3, 0.0, 1.0)
  ground = _mix(ground, petals, flower)
  ground = _mix(ground, _rgb(240, 150, 20), flower * _step(-0.1, -r, soft))
  return w.ground(sky, ground)


_SCENES = (
  _grass, _beach, _snow, _desert, _sea, _night, _brick_wall, _wooden_floor, _road, _flower_meadow,
)  # fmt: skip
assert len(_SCENES) == len(factors.SCENES)


def background(scene, elevation, seed, *, resolution: int):
  """Three arrays [H*W] in [0, 1]: red, green and blue of one background.

  `lax.switch` runs one scene only where the caller maps sequentially, all ten under vmap.
  """
  pixel = 1.0 / resolution
  axis = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) * pixel
  u, v = jnp.tile(axis, resolution), jnp.repeat(axis, resolution)
  seed = seed.astype(jnp.uint32)

  def branch(scene_fn):
    return lambda: tuple(
      jnp.broadcast_to(c, u.shape) for c in scene_fn(_View(u, v, elevation, seed, pixel))
    )

  return lax.switch(scene, [branch(f) for f in _SCENES])
