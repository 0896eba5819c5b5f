"""From factors to a lit picture of an individual, and the filters that turn it into drawings."""

import jax.numpy as jnp
import numpy as np

from data_pipeline.subjects3d import factors, scenes, sdf, shapes

CAMERA_DISTANCE = 7.0  # object units: a mild perspective
_PALETTE = np.array(list(factors.COLOR_RGB.values()), np.float32) / 255.0
_NIGHT, _SEA = factors.SCENES.index("night"), factors.SCENES.index("sea")
_TAU = 2 * np.pi
# By how much, in cells, a pattern is narrower than half of the surface: it covers about a third (of
# a triangle wave 1/2 - 2 x 0.083, of checks less), so that main and pattern colour are distinct.
_STRIPE_GAP, _CHECK_GAP = 0.083, 0.09


def _triangle(x):
  """Triangle wave of period 1, positive in (0, 0.5): the signed distance to the next zero."""
  return 0.25 - jnp.abs((x + 0.25) - jnp.floor(x + 0.25) - 0.5)


def _pattern_weight(kind, x, y, z, normal, pattern_map, pixel):
  """[H*W] weight of the pattern colour in [0, 1], with edges one pixel wide.

  The pattern's coordinates are angle and height for round classes, those of the face for flat ones;
  a swirl always uses angle and height. `pattern_map`: see `shapes.PATTERN_MAP`.
  """
  flat, phase, per_height, around = (pattern_map[k] for k in range(4))
  angle = jnp.arctan2(x, z) / _TAU
  nx, ny, nz = (jnp.abs(n) for n in normal)
  sideways, upwards = (nx > nz) & (nx > ny), (ny > nx) & (ny > nz)
  across = jnp.where(sideways, z, x) * around + 0.5
  v = jnp.where((flat > 0) & upwards, z * around, y * per_height + phase)
  u = jnp.where(flat > 0, across, angle * around)
  cell = pixel * per_height  # a pixel in cells
  stripes = _triangle(y * per_height + phase) - _STRIPE_GAP
  row = jnp.floor(v)
  shifted = u + 0.5 * (row - 2 * jnp.floor(row * 0.5))
  du, dv = shifted - jnp.floor(shifted) - 0.5, v - row - 0.5
  dots = 0.34 - jnp.sqrt(du * du + dv * dv)
  a, b = _triangle(u * 0.5), _triangle(v * 0.5)
  checks = 2 * jnp.minimum(jnp.abs(a), jnp.abs(b)) * jnp.sign(a) * jnp.sign(b) - _CHECK_GAP
  swirl = _triangle(angle * 2.0 + y * per_height * 0.62) - _STRIPE_GAP
  signed = jnp.where(
    kind == 1, stripes, jnp.where(kind == 2, dots, jnp.where(kind == 3, checks, swirl))
  )
  return jnp.where(kind == 0, 0.0, jnp.clip(signed / cell + 0.5, 0.0, 1.0))


def subject(f, placing, rows, pattern_map, *, resolution: int, steps: int):
  """Renders an individual without background.

  Args:
    f: `factors.Factors` of scalars. placing: [4] of `shapes.placing`. rows: the table, see `sdf`.
    pattern_map: [4] of `shapes.PATTERN_MAP`.

  Returns:
    (red, green, blue, alpha, shadow), arrays [H*W] in [0, 1]: shadow is the fraction of light that
    the ground loses; and coverage [4] of the picture by subject, main, second, pattern colour.
  """
  scale, middle, bound = placing[0] * f.size, placing[1], placing[2]
  pixel = 1.0 / (resolution * scale)  # object units at the subject's depth
  axis = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution - 0.5
  a = (jnp.tile(axis, resolution) - f.x) / scale
  b = (f.y - placing[3] * f.size - jnp.repeat(axis, resolution)) / scale
  cos, sin = jnp.cos(f.roll), jnp.sin(f.roll)
  a, b, a_level, b_level = a * cos - b * sin, a * sin + b * cos, a, b

  # The camera moves around the subject, which stays in the coordinates of its table.
  ca, sa = jnp.cos(f.azimuth), jnp.sin(f.azimuth)
  ce, se = jnp.cos(f.elevation), jnp.sin(f.elevation)
  right, up, back = (ca, 0.0, sa), (sa * se, ce, -ca * se), (-sa * ce, se, ca * ce)
  origin = tuple(CAMERA_DISTANCE * k for k in back)
  origin = (origin[0], origin[1] + middle, origin[2])

  def rays(a, b):
    d = [a * r + b * w - CAMERA_DISTANCE * k for r, w, k in zip(right, up, back, strict=True)]
    length = jnp.sqrt(a * a + b * b + CAMERA_DISTANCE**2)
    return tuple(k / length for k in d)

  direction = rays(a, b)
  no_hat = jnp.where(f.hat > 0, 0.0, 1e3)
  t, d = sdf.march(
    origin, direction, CAMERA_DISTANCE - bound, CAMERA_DISTANCE + bound, rows, no_hat, steps=steps
  )
  alpha = jnp.clip(1.1 - d / (0.9 * pixel), 0.0, 1.0)
  x, y, z = (o + t * k for o, k in zip(origin, direction, strict=True))
  normal, material = sdf.normal_and_material(x, y, z, rows, no_hat, 0.35 * pixel)

  palette = jnp.asarray(_PALETTE)
  main, second, pattern = palette[f.color1], palette[f.color2], palette[f.pattern_color]
  hat = palette[jnp.maximum(f.hat - 1, 0)]
  is_dark = (main @ jnp.array([0.3, 0.6, 0.1])) < 0.2
  ink = jnp.where(is_dark, jnp.array([0.95, 0.95, 0.95]), jnp.array([0.05, 0.05, 0.06]))
  weight = _pattern_weight(f.pattern, x, y, z, normal, pattern_map, pixel)

  # A lamp relative to the camera, light from the sky, and a rim light for dark subjects at night.
  la, le = f.light_azimuth, f.light_elevation
  lamp = (jnp.sin(la) * jnp.cos(le), jnp.sin(le), jnp.cos(la) * jnp.cos(le))
  cam = (ca, sa), (-sa, ca)  # horizontal part of right and of back
  lamp_x = lamp[0] * cam[0][0] + lamp[2] * cam[1][0]
  lamp = (lamp_x, lamp[1], lamp[0] * cam[0][1] + lamp[2] * cam[1][1])
  lambert = jnp.maximum(sum(n * k for n, k in zip(normal, lamp, strict=True)), 0.0)
  facing = jnp.maximum(-sum(n * k for n, k in zip(normal, direction, strict=True)), 0.0)
  night = (f.scene == _NIGHT) * 1.0
  light = 0.56 + 0.12 * normal[1] + 0.44 * lambert + 0.05 * facing
  light = light * (0.82 + 0.18 * jnp.clip(y / 0.6, 0.0, 1.0))  # the sky lights the bottom less
  rim = (1.0 - facing) ** 3 * (0.08 + 0.30 * night)
  gloss = jnp.maximum(lambert * facing - 0.55, 0.0) ** 2 * 0.6

  channels = []
  for k in range(3):
    color = main[k] + (pattern[k] - main[k]) * weight
    color = jnp.where(material == shapes.SECOND, second[k], color)
    color = jnp.where(material == shapes.HAT, hat[k], color)
    color = jnp.where(material == shapes.INK, ink[k], color)
    for kind, rgb in shapes.FIXED_RGB.items():
      color = jnp.where(material == kind, rgb[k] / 255.0, color)
    tint = 1.0 - night * (0.14, 0.12, 0.0)[k]
    channels.append(
      jnp.clip(color * light * tint + gloss + rim * (0.8, 0.85, 1.0)[k] + 0.015, 0.0, 1.0)
    )

  # Blob shadow where the ray without roll meets the ground, shifted away from the lamp.
  gx, gy, gz = rays(a_level, b_level)
  reach = -origin[1] / jnp.minimum(gy, -1e-3)
  sx, sz = origin[0] + reach * gx + 0.25 * lamp[0], origin[2] + reach * gz + 0.25 * lamp[2]
  radius = 0.72 * bound
  shadow = jnp.exp(-(((sx * sx + sz * sz) / (0.55 * radius * radius)) ** 1.5)) * (gy < -1e-3)
  shadow = shadow * jnp.where(f.scene == _SEA, 0.3, 0.5)

  is_main = alpha * (material == shapes.MAIN)
  parts = (alpha, is_main * (1 - weight), alpha * (material == shapes.SECOND), is_main * weight)
  coverage = jnp.stack([jnp.mean(p) for p in parts])
  return (*channels, alpha, shadow), coverage


def compose(f, layers, *, resolution: int):
  """Lays a subject's layers [H*W] on its background: RGB [H, W, 3] in [0, 1]."""
  red, green, blue, alpha, shadow = layers
  ground = scenes.background(f.scene, f.elevation, f.background_seed, resolution=resolution)
  out = [
    under * (1 - shadow) * (1 - alpha) + over * alpha
    for under, over in zip(ground, (red, green, blue), strict=True)
  ]
  return jnp.stack(out, -1).reshape(resolution, resolution, 3)


def _shift(image, dy, dx):
  """Neighbour at (dy, dx) with the border repeated."""
  h, w = image.shape[:2]
  pad = [(1, 1), (1, 1)] + [(0, 0)] * (image.ndim - 2)
  return jnp.pad(image, pad, mode="edge")[1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]


def _blur(image):
  """3x3 binomial filter."""
  rows = 0.25 * _shift(image, -1, 0) + 0.5 * image + 0.25 * _shift(image, 1, 0)
  return 0.25 * _shift(rows, 0, -1) + 0.5 * rows + 0.25 * _shift(rows, 0, 1)


def _sketch(image):
  """Pencil on paper: dark contours, a little hatching in the shade, faint colours."""
  gray = image @ jnp.array([0.3, 0.59, 0.11])
  # The strongest channel's gradient: red beside green of the same lightness is a contour too.
  gy = jnp.abs(_shift(image, 1, 0) - _shift(image, -1, 0)).max(-1)
  gx = jnp.abs(_shift(image, 0, 1) - _shift(image, 0, -1)).max(-1)
  line = jnp.clip((jnp.sqrt(gx * gx + gy * gy) - 0.22) * 2.2, 0.0, 1.0)
  h, w = gray.shape
  diagonal = (jnp.arange(h)[:, None] + jnp.arange(w)) % 4
  hatch = jnp.where(diagonal == 0, 0.16, 0.0) * jnp.clip(1.4 - 2.4 * gray, 0.0, 1.0)
  paper = jnp.array([0.965, 0.95, 0.915])
  wash = paper * (0.70 + 0.30 * image / jnp.maximum(image.max(-1, keepdims=True), 0.25))
  wash = wash * (0.80 + 0.20 * gray[..., None])
  return wash * (1 - hatch[..., None]) * (1 - 0.82 * line[..., None])


def _watercolour(image):
  """Soft washes on paper: darker contours, lightness in a few steps, a white margin.

  The lightness is quantised, not each channel, which would lose the subject.
  """
  soft = _blur(image)
  gray = soft @ jnp.array([0.3, 0.59, 0.11])
  level = gray * 5.0
  base = jnp.floor(level)
  stepped = (base + jnp.clip((level - base - 0.5) * 3.0 + 0.5, 0.0, 1.0)) / 5.0
  washed = soft * ((stepped + 0.1) / (gray + 0.1))[..., None]
  # What the blur removes is at the contours, where the pigment of a wash gathers.
  edge = jnp.abs(image - _blur(soft)).max(-1)
  washed = washed * (1 - jnp.clip(2.2 * edge, 0.0, 0.6))[..., None]
  # The paper shines through, so the colours are made more saturated.
  tone = washed @ jnp.array([0.3, 0.59, 0.11])
  washed = tone[..., None] + 1.3 * (washed - tone[..., None])
  h, w = tone.shape
  y, x = jnp.abs(jnp.linspace(-1, 1, h))[:, None], jnp.abs(jnp.linspace(-1, 1, w))
  margin = jnp.clip((1.0 - jnp.maximum(x, y)) * 9.0 - 0.25 + 0.5 * (tone - 0.5), 0.0, 1.0)
  strength = 0.78 * margin[..., None]  # the wash ends before the edge of the sheet
  return jnp.array([1.0, 0.99, 0.97]) * (1.0 - (1.0 - jnp.clip(washed, 0.0, 1.0)) * strength)


def stylise(style, image):
  """Photo, sketch or watercolour (`factors.STYLES`) of one picture [H, W, 3] in [0, 1]."""
  drawn = jnp.where(style == 1, _sketch(image), _watercolour(image))
  return jnp.where(style == 0, image, jnp.clip(drawn, 0.0, 1.0))
