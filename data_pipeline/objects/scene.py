"""What a view shows beside the model: pose, place in the frame, light, floor, background, caption.

All drawn from (seed, model's key, view) by a counter-based generator: no view needs another.
"""

from typing import NamedTuple

import numpy as np

from data_pipeline import sampling
from data_pipeline.words import with_article

# Ground and back are patterns of shaders.py. A caption draws one of the phrases.
GROUNDS = ("plain", "wood", "grass", "sand", "snow", "asphalt", "tiles", "carpet", "meadow")
BACKS = ("studio", "sky", "wall", "bricks", "sea")


class Scene(NamedTuple):
  """A kind of place, and the words for it."""

  ground: str
  back: str
  ground_color: tuple[float, float, float]  # sRGB, of the light parts
  back_color: tuple[float, float, float]
  phrases: tuple[str, ...]


SCENES = {
  "grass": Scene("grass", "sky", (0.36, 0.58, 0.22), (0.55, 0.75, 0.95),
                 ("on the grass", "on green grass", "standing on the grass")),
  "beach": Scene("sand", "sea", (0.90, 0.82, 0.62), (0.60, 0.82, 0.97),
                 ("on the beach", "at the beach", "standing on a sandy beach")),
  "snow": Scene("snow", "sky", (0.94, 0.96, 1.00), (0.78, 0.84, 0.92),
                ("in the snow", "on the snow", "standing in the snow")),
  "desert": Scene("sand", "sky", (0.88, 0.62, 0.36), (0.70, 0.82, 0.96),
                  ("in the desert", "in a sandy desert", "standing in the desert")),
  "brick wall": Scene("asphalt", "bricks", (0.62, 0.60, 0.58), (0.66, 0.30, 0.22),
                      ("by a brick wall", "in front of a brick wall", "next to a brick wall")),
  "wooden floor": Scene("wood", "wall", (0.72, 0.50, 0.30), (0.88, 0.85, 0.78),
                        ("on a wooden floor", "on the wooden floor",
                         "standing on a wooden floor")),
  "road": Scene("asphalt", "sky", (0.42, 0.42, 0.44), (0.62, 0.76, 0.92),
                ("on a road", "on the road", "standing on the road")),
  "meadow": Scene("meadow", "sky", (0.40, 0.62, 0.26), (0.52, 0.74, 0.96),
                  ("in a flower meadow", "in a meadow of flowers",
                   "standing in a flower meadow")),
  "tiles": Scene("tiles", "wall", (0.86, 0.86, 0.84), (0.70, 0.82, 0.86),
                 ("on a tiled floor", "on white tiles", "on the tiles")),
  "carpet": Scene("carpet", "wall", (0.62, 0.22, 0.24), (0.84, 0.80, 0.72),
                  ("on a carpet", "on a red carpet", "on the carpet")),
  "studio": Scene("plain", "studio", (0.93, 0.93, 0.93), (0.93, 0.93, 0.93),
                  ("on a white background", "in a photo studio", "in front of a white wall")),
}  # fmt: skip
_STYLES = ("", "", "a photo of ", "a picture of ")


class View(NamedTuple):
  """One picture's scene and camera.

  The camera looks at the middle of the model, which stands at the origin with y up and radius 1,
  from `azimuth` (radians, 0 = from +z, its front; grows to +x), `elevation`, `distance`, and is
  turned by `roll`. The longer side of the model's projection is `share` of the frame, its middle at
  `place` (x to the right, y down; 0.5 = the frame's).
  """

  scene: str
  caption: str
  azimuth: float
  elevation: float
  roll: float
  distance: float
  share: float
  place: tuple[float, float]
  light: tuple[float, float, float]  # towards the sun, of length 1
  sun: tuple[float, float, float]  # linear, multiplies the colour where light falls straight
  ambient: float
  turn: float  # of floor and wall against the camera
  tint: tuple[float, float, float]  # multiplies the background's colours
  background_seed: int


def draw_views(seed: int, key: str, noun: str, count: int) -> list[View]:
  """The `count` views of the model `key`, `count` equal sectors of azimuth around it."""
  return [draw_view(seed, key, noun, view, count) for view in range(count)]


def draw_view(seed: int, key: str, noun: str, view: int, count: int) -> View:
  """View number `view` of `count`."""
  rng = np.random.Generator(np.random.Philox(
    key=[seed % 2**64, sampling.name_hash(key)], counter=[0, 0, view, 0]
  ))  # fmt: skip
  scene = list(SCENES)[rng.integers(len(SCENES))]
  style, phrase = (c[rng.integers(len(c))] for c in (_STYLES, SCENES[scene].phrases))
  azimuth = 2 * np.pi * (view + rng.uniform()) / count
  elevation = np.deg2rad(rng.uniform(6, 42))
  share = rng.uniform(0.5, 0.8)
  free = (1 - share) / 2 - 0.03
  light_azimuth = azimuth + rng.uniform(-1.9, 1.9)  # from behind the object it would be black
  light_elevation = np.deg2rad(rng.uniform(38, 70))
  warmth = rng.uniform(-0.06, 0.08)
  strength = rng.uniform(0.75, 1.15)
  return View(
    scene, f"{style}{with_article(noun)} {phrase}", float(azimuth), float(elevation),
    float(np.deg2rad(rng.normal(0, 2.5))), float(rng.uniform(3.0, 5.5)), float(share),
    (float(0.5 + rng.uniform(-free, free)), float(0.5 + rng.uniform(-free, free))),
    (float(np.cos(light_elevation) * np.sin(light_azimuth)), float(np.sin(light_elevation)),
     float(np.cos(light_elevation) * np.cos(light_azimuth))),
    (float(strength * (1 + warmth)), float(strength), float(strength * (1 - warmth))),
    float(rng.uniform(0.40, 0.55)), float(rng.uniform(-0.5, 0.5)),
    tuple(map(float, rng.uniform(0.88, 1.08) * rng.uniform(0.94, 1.04, 3))),
    int(rng.integers(2**31)),
  )  # fmt: skip


class Camera(NamedTuple):
  """Where a place of the world is seen: `pixel = intrinsics @ (world_to_camera @ [x, y, z, 1])`.

  OpenCV's axes: x to the right, y down, z forwards; pixel (0, 0) is the corner of the first one.
  """

  world_to_camera: np.ndarray  # float64 [3, 4]
  intrinsics: np.ndarray  # float64 [3, 3]


def camera(view: View, vertices: np.ndarray, size: int) -> Camera:
  """The camera of a view of a model with these vertices [n, 3], in a frame of `size` pixels."""
  middle = np.array([0, vertices[:, 1].max() / 2, 0])
  sin_a, cos_a = np.sin(view.azimuth), np.cos(view.azimuth)
  sin_e, cos_e = np.sin(view.elevation), np.cos(view.elevation)
  back = np.array([sin_a * cos_e, sin_e, cos_a * cos_e])  # from the model to the camera
  right = np.array([cos_a, 0, -sin_a])
  down = np.cross(-back, right)
  sin_r, cos_r = np.sin(view.roll), np.cos(view.roll)
  rotation = np.stack([cos_r * right + sin_r * down, cos_r * down - sin_r * right, -back])
  translation = -rotation @ (middle + view.distance * back)
  seen = vertices @ rotation.T + translation
  seen = seen[:, :2] / seen[:, 2:]
  low, high = seen.min(0), seen.max(0)
  focal = view.share * size / max((high - low).max(), 1e-6)
  centre = np.array(view.place) * size - focal * (low + high) / 2
  intrinsics = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
  return Camera(np.concatenate([rotation, translation[:, None]], 1), intrinsics)
