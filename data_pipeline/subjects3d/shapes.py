"""The ten classes as tables of super-primitives (numpy only).

A row of 17 numbers (`FIELDS`) is a solid; special cases are sphere, ellipsoid, (rounded, tapered)
box, cylinder, capsule, cone, torus and band. A proportion (wide, tall, ratio in [-1, 1]) changes
the numbers linearly: base + wide * d_wide + tall * d_tall + ratio * d_ratio.

Object frame: y up, ground at y = 0, front towards +z, and +x to the picture's right when the front
faces the camera.
"""

import numpy as np

from data_pipeline.subjects3d import factors

FIELDS = (
  "cx", "cy", "cz",  # centre
  "rx", "rz",  # tilt of the solid's y axis towards +z and towards +x
  "sx", "sy", "sz",  # scales
  "bx", "bz",  # half-extents of the box part
  "h", "r",  # half height and radius of the cylinder part
  "rnd",  # rounding: a sphere has only this
  "taper",  # fraction by which box and radius shrink from bottom to top
  "ring",  # > 0: bent to a ring of that radius around the x axis (bx radial, bz axial)
  "mirror",  # 1: also at -x; 2: also at -x, at -z and at both
  "mat",
)  # fmt: skip
MAIN, SECOND, HAT, INK, WHITE, ORANGE, LAMP, TAIL_LAMP, GLASS, DARK = range(10)
# Materials that are the same for all individuals. INK is black, or white on a dark subject.
FIXED_RGB = {
  WHITE: (245, 245, 245), ORANGE: (255, 140, 0), LAMP: (255, 250, 170), TAIL_LAMP: (255, 20, 20),
  GLASS: (178, 222, 245), DARK: (46, 46, 52),
}  # fmt: skip


def _row(mat, c, *, wide=None, tall=None, ratio=None, **fields) -> np.ndarray:
  """One solid, [17, 4]: base and its change with each proportion, given as dicts of FIELDS."""
  row = np.zeros((len(FIELDS), 4), np.float32)
  base = {"sx": 1, "sy": 1, "sz": 1, "mat": mat, "cx": c[0], "cy": c[1], "cz": c[2]} | fields
  for k, change in enumerate((base, wide or {}, tall or {}, ratio or {})):
    for name, value in change.items():
      row[FIELDS.index(name), k] = value
  return row


def _hat(y, *, z=0.0, size=1.0, wide=0.0, tall=0.0, ratio=0.0):
  """A bowler: brim and crown; y = its height, and how that changes with the proportions."""
  moves = {"wide": {"cy": wide}, "tall": {"cy": tall}, "ratio": {"cy": ratio}}
  crown = dict(r=0.24 * size, h=0.14 * size, rnd=0.09 * size, taper=0.15)
  return [
    _row(HAT, (0, y, z), r=0.5 * size, h=0.01, rnd=0.045 * size, **moves),
    _row(HAT, (0, y + 0.2 * size, z), **crown, **moves),
  ]


def _teapot():
  return [
    _row(MAIN, (0, 0.94, 0), sx=1.12, sy=0.9, sz=1.12, rnd=1,
         wide={"sx": 0.14, "sz": 0.14}, tall={"sy": 0.12, "cy": 0.1}),
    _row(SECOND, (0, 1.72, 0), r=0.46, h=0.03, rnd=0.13, taper=0.3,
         tall={"cy": 0.2}, ratio={"r": 0.1}),
    _row(SECOND, (0, 2.0, 0), rnd=0.2, tall={"cy": 0.2}, ratio={"rnd": 0.04, "cy": 0.02}),
    _row(SECOND, (0, 1.08, 1.14), rx=0.72, r=0.3, h=0.38, rnd=0.06, taper=0.5,
         wide={"cz": 0.14}, tall={"cy": 0.12}, ratio={"r": 0.05, "h": 0.08, "cz": 0.05}),
    _row(SECOND, (0, 1.04, -1.0), sy=1.2, ring=0.4, rnd=0.16,
         wide={"cz": -0.12}, tall={"cy": 0.1, "sy": 0.1}, ratio={"ring": 0.06}),
    _row(SECOND, (0, 0.13, 0), r=0.6, h=0.07, rnd=0.06, wide={"r": 0.1}),
    *_hat(2.1, size=1.0, tall=0.2, ratio=0.05),
  ]  # fmt: skip


def _snowman():
  return [
    _row(MAIN, (0, 0.76, 0), rnd=0.98, sy=0.84, wide={"sx": 0.1, "sz": 0.1}, ratio={"rnd": 0.05}),
    _row(MAIN, (0, 1.52, 0), rnd=0.7, wide={"sx": 0.1, "sz": 0.1}, tall={"cy": 0.12}),
    _row(MAIN, (0, 2.22, 0), rnd=0.58, tall={"cy": 0.24}, ratio={"rnd": -0.06}),
    _row(SECOND, (0, 1.84, 0), rz=np.pi / 2, ring=0.46, rnd=0.2, bz=0.06,
         tall={"cy": 0.2}, ratio={"rnd": 0.03}),  # scarf
    _row(SECOND, (0.26, 1.46, 0.68), rx=-0.12, bx=0.13, h=0.26, rnd=0.08, tall={"cy": 0.16}),
    _row(SECOND, (0.96, 1.52, 0), rz=1.0, h=0.28, rnd=0.2, mirror=1,
         wide={"cx": 0.08}, tall={"cy": 0.12}),  # arms
    _row(ORANGE, (0, 2.2, 0.76), rx=np.pi / 2, r=0.13, h=0.26, rnd=0.03, taper=0.9,
         tall={"cy": 0.24}),  # carrot
    _row(INK, (0.22, 2.4, 0.48), rnd=0.11, mirror=1, tall={"cy": 0.24}),
    _row(INK, (0, 0.86, 0.96), rnd=0.12, wide={"cz": 0.1}),
    *_hat(2.72, tall=0.24, ratio=-0.05),
  ]  # fmt: skip


def _mushroom():
  return [
    _row(MAIN, (0, 1.5, 0), sy=0.58, rnd=1.16,
         wide={"sx": 0.12, "sz": 0.12}, tall={"cy": 0.12}, ratio={"sy": 0.1}),  # cap
    _row(SECOND, (0, 0.52, 0), r=0.56, h=0.5, rnd=0.08, taper=0.25,
         tall={"h": 0.08, "cy": 0.06}, ratio={"r": 0.08}),  # stem
    _row(SECOND, (0, 0.12, 0), r=0.62, h=0.06, rnd=0.08, ratio={"r": 0.08}),  # its foot
    *_hat(2.14, tall=0.12, ratio=0.1, size=1.1),
  ]  # fmt: skip


def _robot():
  return [
    _row(MAIN, (0, 0.98, 0), bx=0.62, bz=0.42, h=0.5, rnd=0.08,
         wide={"bx": 0.12, "bz": 0.06}, tall={"h": 0.1, "cy": 0.1}),  # trunk
    _row(MAIN, (0, 1.9, 0), bx=0.44, bz=0.36, h=0.3, rnd=0.08,
         tall={"cy": 0.2}, ratio={"bx": 0.09, "h": 0.06, "cy": 0.05}),  # head
    _row(LAMP, (0.2, 1.98, 0.44), rnd=0.15, mirror=1,
         tall={"cy": 0.2}, ratio={"cx": 0.04, "cy": 0.05}),  # eyes
    _row(DARK, (0, 1.68, 0.44), bx=0.26, bz=0.02, h=0.03, rnd=0.05,
         tall={"cy": 0.2}, ratio={"cy": 0.03}),  # mouth
    _row(SECOND, (0.98, 0.98, 0), h=0.36, rnd=0.22, mirror=1,
         wide={"cx": 0.12}, tall={"cy": 0.12, "h": 0.05}),  # arms
    _row(DARK, (0.98, 0.44, 0), rnd=0.21, mirror=1, wide={"cx": 0.12}, tall={"cy": 0.06}),
    _row(SECOND, (0.36, 0.22, 0.06), bx=0.2, bz=0.34, h=0.16, rnd=0.08, mirror=1,
         wide={"cx": 0.05}),  # legs
    _row(GLASS, (0, 1.14, 0.51), bx=0.2, bz=0.02, h=0.14, rnd=0.04,
         wide={"cz": 0.06}, tall={"cy": 0.14}),  # chest screen
    _row(SECOND, (0, 1.1, -0.64), bx=0.36, bz=0.14, h=0.34, rnd=0.08,
         wide={"cz": -0.06}, tall={"cy": 0.12}),  # backpack
    _row(TAIL_LAMP, (0.2, 1.12, -0.86), rnd=0.15, mirror=1, wide={"cz": -0.06}, tall={"cy": 0.12}),
    _row(SECOND, (0.56, 1.95, 0), rz=np.pi / 2, r=0.16, h=0.04, rnd=0.06, mirror=1,
         tall={"cy": 0.2}, ratio={"cx": 0.09, "cy": 0.05}),  # ears
    *_hat(2.3, tall=0.2, ratio=0.14, size=0.95),
  ]  # fmt: skip


def _rocket():
  return [
    _row(MAIN, (0, 1.22, 0), r=0.6, h=0.5, rnd=0.26, wide={"r": 0.1}, tall={"h": 0.12, "cy": 0.12}),
    _row(SECOND, (0, 2.24, 0), r=0.76, h=0.4, rnd=0.06, taper=0.9, wide={"r": 0.1},
         tall={"cy": 0.24}, ratio={"h": 0.1, "cy": 0.1}),  # nose
    _row(SECOND, (0.98, 0.5, 0), rz=-0.42, bx=0.24, bz=0.06, h=0.38, rnd=0.06, taper=0.55, mirror=1,
         wide={"cx": 0.1}, ratio={"h": 0.06, "bx": 0.06}),  # fins left and right
    _row(SECOND, (0, 0.5, -0.98), rx=0.42, bx=0.06, bz=0.24, h=0.38, rnd=0.06, taper=0.55,
         wide={"cz": -0.1}, ratio={"h": 0.06, "bz": 0.06}),  # and at the back
    _row(DARK, (0, 0.28, 0), r=0.66, h=0.2, rnd=0.05, taper=0.4),  # nozzle
    _row(GLASS, (0, 1.42, 0.76), rnd=0.3, wide={"cz": 0.1}, tall={"cy": 0.14}),  # window
    _row(WHITE, (0, 1.42, 0.81), rx=np.pi / 2, r=0.37, h=0.02, rnd=0.06,
         wide={"cz": 0.1}, tall={"cy": 0.14}),
    _row(TAIL_LAMP, (0, 1.46, -0.82), bx=0.12, bz=0.06, h=0.3, rnd=0.06,
         wide={"cz": -0.1}, tall={"cy": 0.14}),  # rail on the back
    *_hat(2.5, tall=0.24, ratio=0.18, size=0.95),
  ]  # fmt: skip


def _tree():
  return [
    _row(MAIN, (0, 1.26, 0), r=1.12, h=0.34, rnd=0.05, taper=0.6,
         wide={"r": 0.14}, ratio={"r": 0.08}),
    _row(MAIN, (0, 1.8, 0), r=0.9, h=0.34, rnd=0.05, taper=0.64,
         wide={"r": 0.12}, tall={"cy": 0.1}),
    _row(MAIN, (0, 2.34, 0), r=0.66, h=0.38, rnd=0.05, taper=0.92, wide={"r": 0.08},
         tall={"cy": 0.2}, ratio={"r": -0.05}),
    _row(SECOND, (0, 0.4, 0), r=0.62, h=0.36, rnd=0.05, taper=-0.25,
         wide={"r": 0.05}, ratio={"r": 0.06}),  # pot
    _row(SECOND, (0, 0.72, 0), r=0.82, h=0.09, rnd=0.05, ratio={"r": 0.06}),
    *_hat(2.54, tall=0.2, size=0.95),
  ]  # fmt: skip


def _duck():
  return [
    _row(MAIN, (0, 0.76, -0.05), sx=0.92, sy=0.72, sz=1.02, rnd=1,
         wide={"sx": 0.12}, tall={"sy": 0.06, "cy": 0.06}),
    _row(MAIN, (0, 1.66, 0.4), rnd=0.66, tall={"cy": 0.18}, ratio={"rnd": 0.08}),
    _row(MAIN, (0, 1.18, 0.38), r=0.34, h=0.2, rnd=0.08, tall={"cy": 0.1, "h": 0.08}),  # neck
    _row(ORANGE, (0, 1.54, 1.1), rx=np.pi / 2, r=0.28, h=0.2, rnd=0.06, sz=0.62, taper=0.4,
         tall={"cy": 0.18}, ratio={"cz": 0.05}),  # beak
    _row(INK, (0.34, 1.84, 0.88), rnd=0.14, mirror=1,
         tall={"cy": 0.18}, ratio={"cz": 0.05, "cx": 0.03}),
    _row(SECOND, (0.84, 0.86, -0.22), rz=0.3, rx=-0.3, sx=0.24, sy=0.48, sz=0.72, rnd=1, mirror=1,
         wide={"cx": 0.12}, tall={"cy": 0.06}, ratio={"sz": -0.05}),  # wings
    _row(SECOND, (0, 1.08, -0.96), rx=-0.7, r=0.4, h=0.24, rnd=0.07, taper=0.75,
         tall={"cy": 0.08}),  # tail
    _row(ORANGE, (0.34, 0.06, 0.2), bx=0.1, bz=0.24, h=0.01, rnd=0.07, mirror=1),
    *_hat(2.24, z=0.4, tall=0.18, ratio=0.08),
  ]  # fmt: skip


def _house():
  return [
    _row(MAIN, (0, 0.78, 0), bx=0.92, bz=0.76, h=0.74, rnd=0.04,
         wide={"bx": 0.12, "bz": 0.08}, tall={"h": 0.1, "cy": 0.1}),
    _row(SECOND, (0, 1.86, 0), bx=1.02, bz=0.88, h=0.34, rnd=0.05, taper=0.86,
         wide={"bx": 0.12, "bz": 0.08}, tall={"cy": 0.2}, ratio={"h": 0.1, "cy": 0.1}),
    _row(DARK, (0, 0.5, 0.78), bx=0.18, bz=0.04, h=0.42, rnd=0.05, wide={"cz": 0.08}),  # door
    _row(LAMP, (0.1, 0.5, 0.88), rnd=0.08, wide={"cz": 0.08}),  # its knob
    _row(GLASS, (0.58, 0.92, 0.78), bx=0.14, bz=0.03, h=0.17, rnd=0.06, mirror=1,
         wide={"cx": 0.06, "cz": 0.08}, tall={"cy": 0.1}),  # front windows
    _row(GLASS, (0, 0.92, -0.8), bx=0.36, bz=0.03, h=0.12, rnd=0.06,
         wide={"cz": -0.08}, tall={"cy": 0.1}),  # wide back window
    _row(DARK, (0.5, 2.02, -0.34), bx=0.13, bz=0.13, h=0.36, rnd=0.05,
         tall={"cy": 0.2}, ratio={"cy": 0.1}),  # chimney
    *_hat(2.22, tall=0.2, ratio=0.2, size=0.95),
  ]  # fmt: skip


def _car():
  return [
    _row(MAIN, (0, 0.66, 0), bx=0.56, bz=1.06, h=0.2, rnd=0.18,
         wide={"bx": 0.1}, tall={"cy": 0.03, "h": 0.03}, ratio={"bz": 0.08}),
    _row(SECOND, (0, 1.32, -0.14), bx=0.56, bz=0.68, h=0.26, rnd=0.1, taper=0.32,
         wide={"bx": 0.1}, tall={"cy": 0.12, "h": 0.08}, ratio={"bz": -0.08}),
    _row(GLASS, (0, 1.26, -0.14), bx=0.62, bz=0.34, h=0.14, rnd=0.04, taper=0.2,
         wide={"bx": 0.1}, tall={"cy": 0.12, "h": 0.04}),  # side windows
    _row(GLASS, (0, 1.26, -0.14), bx=0.36, bz=0.76, h=0.14, rnd=0.04, taper=0.2,
         wide={"bx": 0.1}, tall={"cy": 0.12, "h": 0.04}, ratio={"bz": -0.08}),  # front and back
    _row(DARK, (0.66, 0.34, 0.72), rz=np.pi / 2, r=0.26, h=0.1, rnd=0.07, mirror=2,
         wide={"cx": 0.1}, ratio={"cz": 0.06}),
    _row(WHITE, (0.8, 0.34, 0.72), rz=np.pi / 2, r=0.1, h=0.03, rnd=0.04, mirror=2,
         wide={"cx": 0.1}, ratio={"cz": 0.06}),
    _row(LAMP, (0.44, 0.76, 1.22), rnd=0.17, mirror=1,
         wide={"cx": 0.08}, tall={"cy": 0.03}, ratio={"cz": 0.08}),
    _row(DARK, (0, 0.6, 1.22), bx=0.2, bz=0.02, h=0.08, rnd=0.05, ratio={"cz": 0.08}),  # grille
    _row(TAIL_LAMP, (0.48, 0.74, -1.22), bx=0.08, bz=0.02, h=0.06, rnd=0.07, mirror=1,
         wide={"cx": 0.08}, ratio={"cz": -0.08}),
    *_hat(1.7, z=-0.14, tall=0.2, size=1.05),
  ]  # fmt: skip


def _teddy():
  return [
    _row(MAIN, (0, 0.74, 0), sx=0.84, sy=0.78, sz=0.72, rnd=1,
         wide={"sx": 0.1, "sz": 0.08}, tall={"sy": 0.06, "cy": 0.06}),
    _row(MAIN, (0, 1.8, 0.06), rnd=0.72, sx=1.08, tall={"cy": 0.12}, ratio={"rnd": 0.06}),
    _row(SECOND, (0.6, 2.28, 0), sz=0.6, rnd=0.3, mirror=1,
         tall={"cy": 0.12}, ratio={"rnd": 0.04, "cx": 0.04}),  # ears
    _row(SECOND, (0, 1.62, 0.62), sz=0.8, sy=0.8, rnd=0.34,
         tall={"cy": 0.12}, ratio={"cz": 0.05}),  # snout
    _row(INK, (0, 1.74, 0.92), rnd=0.13, tall={"cy": 0.12}, ratio={"cz": 0.05}),
    _row(INK, (0.3, 2.0, 0.66), rnd=0.12, mirror=1, tall={"cy": 0.12}, ratio={"cz": 0.05}),
    _row(MAIN, (0.86, 1.0, 0.2), rz=0.75, rx=0.3, h=0.2, rnd=0.26, mirror=1, wide={"cx": 0.08}),
    _row(SECOND, (1.02, 1.18, 0.32), rnd=0.29, mirror=1, wide={"cx": 0.08}),  # paws
    _row(SECOND, (0.52, 0.32, 0.64), rnd=0.35, sz=1.1, mirror=1, wide={"cx": 0.05}),  # feet
    _row(SECOND, (0, 0.74, 0.46), sx=0.5, sy=0.54, sz=0.34, rnd=1, wide={"cz": 0.08}),  # belly
    _row(SECOND, (0, 0.46, -0.74), rnd=0.26, wide={"cz": -0.08}),  # tail
    *_hat(2.44, z=0.04, tall=0.12, ratio=0.06),
  ]  # fmt: skip


_MAKERS = (_teapot, _snowman, _mushroom, _robot, _rocket, _tree, _duck, _house, _car, _teddy)
TABLES = tuple(np.stack(maker()) for maker in _MAKERS)  # per class: rows x 17 x 4
# Per class: round or flat, phase of the height, cells per unit height, cells around (or per unit).
_ROUND, _FLAT = 0.0, 1.0
PATTERN_MAP = np.array([
  (_ROUND, 0.02, 1.5, 8), (_ROUND, 0.0, 1.4, 8), (_ROUND, 0.1, 1.5, 8), (_FLAT, 0.1, 1.6, 1.6),
  (_ROUND, 0.1, 1.5, 6), (_ROUND, 0.1, 1.6, 8), (_ROUND, 0.0, 1.5, 8), (_FLAT, 0.0, 1.5, 1.5),
  (_FLAT, 0.85, 1.7, 1.7), (_ROUND, 0.0, 1.5, 8),
], np.float32)  # fmt: skip
# Per class, measured on pictures of 400 individuals each: the size at which the border cuts hardly
# any; how far the silhouette's centre is below that of the solid, in canvas widths at size 1.
FIT = np.array([1.12, 1.08, 1.02, 1.01, 1.05, 1.05, 1.13, 0.91, 0.97, 0.99], np.float32)
LIFT = np.array([20, -4, 18, 6, 26, 16, 7, 40, 29, 12], np.float32) * 1e-3


def _rotated_extents(a, b, angle):
  """Half-extents along two axes of a box rotated by `angle` in their plane."""
  cos, sin = np.abs(np.cos(angle)), np.abs(np.sin(angle))
  return cos * a + sin * b, sin * a + cos * b


def extents(subjects: factors.Subjects | factors.Factors) -> np.ndarray:
  """[n, 4]: half width (x), half depth (z), bottom and top (y) without hat, in object units.

  Bounds of the rotated boxes around the solids: always a little too large for round ones.
  """
  out = np.zeros((len(subjects.class_id), 4), np.float32)
  for c in np.unique(subjects.class_id):
    of_class = subjects.class_id == c
    proportions = np.stack([subjects.wide, subjects.tall, subjects.ratio])[:, of_class]
    weight = np.concatenate([np.ones((1, of_class.sum())), proportions])
    table = TABLES[c][TABLES[c][:, -1, 0] != HAT]
    columns = np.moveaxis(np.einsum("pfk,kn->npf", table, weight), -1, 0)
    f = dict(zip(FIELDS, columns, strict=True))
    ring = f["ring"] > 0
    ex = (np.where(ring, f["bz"], np.maximum(f["r"], f["bx"])) + f["rnd"]) * f["sx"]
    ey = (np.where(ring, f["ring"] + f["bx"], f["h"]) + f["rnd"]) * f["sy"]
    ez = np.where(ring, f["ring"] + f["bx"], np.maximum(f["r"], f["bz"])) + f["rnd"]
    ey, ex = _rotated_extents(ey, ex, f["rz"])
    ey, ez = _rotated_extents(ey, ez * f["sz"], f["rx"])
    bounds = (np.abs(f["cx"]) + ex, np.abs(f["cz"]) + ez, ey - f["cy"], f["cy"] + ey)
    out[of_class] = np.stack([b.max(1) for b in bounds], -1) * (1, 1, -1, 1)
  return out


def placing(f: factors.Factors) -> np.ndarray:
  """[n, 4]: canvas widths per object unit at size 1, height of the centre in object units, bounding
  radius (with hat), and the canvas widths by which the centre is raised at size 1."""
  e = extents(f)
  half_height = (e[:, 3] - e[:, 2]) / 2
  half_width = np.hypot(e[:, 0], e[:, 1]) * 0.8
  # Seen from an elevation of about 0.35 rad.
  depth = np.minimum(e[:, 0], e[:, 1]) * np.sin(0.35) * 0.6
  reach = np.maximum(half_width, half_height * np.cos(0.35) + depth)
  scale = 0.278 * FIT[f.class_id] / reach
  bound = np.sqrt(e[:, 0] ** 2 + e[:, 1] ** 2 + (half_height + 0.5) ** 2)
  middle = (e[:, 3] + e[:, 2]) / 2
  lift = LIFT[f.class_id] - np.where(f.hat > 0, 0.035, 0.0)  # lower under a hat
  return np.stack([scale, middle, bound, lift], -1).astype(np.float32)
