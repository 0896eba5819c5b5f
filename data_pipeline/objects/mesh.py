"""A 3D model as arrays for the renderer: triangles by material, upright, of radius 1."""

import functools
import io
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.objects.catalogue import Model

MAX_FACES = 2_000_000
_MANY_FACES = 4000  # above, rendering takes longer than merging
_CREASE = 0.7  # cosine: edges sharper than 45 degrees stay edges
_MOST_AROUND = 256


class Part(NamedTuple):
  """Triangles of one material: vertices f4 [n, 8] (place, normal, texture coordinates)."""

  vertices: np.ndarray
  faces: np.ndarray  # int32 [m, 3]
  color: tuple[float, float, float, float]  # sRGB and opacity, 0 ... 1
  texture: np.ndarray | None  # uint8 [h, w, 4], first row = bottom


def load(model: Model, size: int = 128) -> list[Part]:
  """The parts of a model: y is up, it stands on y = 0, its centre is on x = z = 0.

  Its vertices are at most 1 away from the centre of its bounding box. For pictures of `size` pixels
  textures are at most 2 * size a side, and what is finer than half a pixel of a model with many
  triangles is merged.

  Raises:
    DataError: a file that cannot be read, or that has no triangles.
  """
  import trimesh

  try:
    scene = _read(model, trimesh)
    parts = []
    for node in scene.graph.nodes_geometry:
      transform, name = scene.graph[node]
      if hasattr(scene.geometry[name], "faces"):
        parts.append(_part(scene.geometry[name], np.asarray(transform), 2 * size))
  except DataError:
    raise
  except Exception as error:  # a broken file raises anything: the readers check little
    reason = " ".join(str(error).split())[:150]
    raise DataError(f"cannot be read ({type(error).__name__}: {reason})") from None
  parts = [part for part in parts if part is not None]
  if not parts:
    raise DataError("has no triangles")
  count = sum(len(part.faces) for part in parts)
  if count > MAX_FACES:
    raise DataError(f"has {count} triangles, more than {MAX_FACES}")
  parts = _upright(parts, model)
  return [_merged(part, size) for part in parts] if count > _MANY_FACES else parts


def _read(model: Model, trimesh):
  kind = Path(model.member or model.path).suffix.lower().lstrip(".")
  # process=False: no merging of vertices, which tears normals and texture coordinates apart.
  options = dict(file_type=kind, process=False)
  if not model.member:
    return trimesh.load_scene(model.path, **options)
  archive, names = _archive(model.path)
  resolver = _in_zip(archive, names, PurePosixPath(model.member).parent.as_posix(), trimesh)
  return trimesh.load_scene(io.BytesIO(archive.read(model.member)), resolver=resolver, **options)


@functools.lru_cache(maxsize=8)
def _archive(path: str) -> tuple[zipfile.ZipFile, dict[str, str]]:
  """An open .sh3f, whose table of contents takes longer to read than a model, and its names."""
  archive = zipfile.ZipFile(path)
  return archive, {name.lower(): name for name in archive.namelist()}


def _in_zip(archive: zipfile.ZipFile, names: dict[str, str], folder: str, trimesh):
  class Files(trimesh.resolvers.Resolver):
    """Files beside the model, by names as people on Windows write them."""

    def __init__(self):
      """Nothing is to be kept: archive and folder are those around it."""

    def get(self, name):
      path = f"{folder}/{name.strip()}".replace("\\", "/").replace("/./", "/").lower()
      return archive.read(names[path])

    def keys(self):
      return list(names.values())

    def write(self, name, data):
      raise NotImplementedError("catalogues are only read")

    def namespaced(self, namespace):
      return _in_zip(archive, names, f"{folder}/{namespace}", trimesh)

  return Files()


def _part(mesh, transform, texture_size: int) -> Part | None:
  places = (np.asarray(mesh.vertices) @ transform[:3, :3].T + transform[:3, 3]).astype(np.float32)
  faces = np.asarray(mesh.faces, np.int64)
  if not len(faces) or not np.isfinite(places[faces]).all():
    return None
  texture, color = None, (0.8, 0.8, 0.8, 1.0)
  uv = getattr(mesh.visual, "uv", None)
  if uv is not None and len(uv) == len(places):
    color, texture = _material(mesh.visual.material, texture_size)
    uv = np.nan_to_num(np.asarray(uv, np.float32))
  else:
    uv = np.zeros((len(places), 2), np.float32)
    material = getattr(mesh.visual, "material", None)
    if material is not None:
      color, _ = _material(material, texture_size)
    elif mesh.visual.kind == "vertex":  # colours of vertices: a texture of one row
      colors = np.asarray(mesh.visual.vertex_colors, np.uint8)
      palette, index = np.unique(colors, axis=0, return_inverse=True)
      palette, index = palette[:4096], np.minimum(index.ravel(), 4095)
      uv = np.stack([(index + 0.5) / len(palette), np.full(len(index), 0.5)], 1, dtype=np.float32)
      color, texture = (1.0, 1.0, 1.0, 1.0), palette[None]
    elif mesh.visual.kind == "face":
      color = _floats(np.asarray(mesh.visual.face_colors)[0])
  if color[3] < 0.03:
    return None  # invisible: helpers of modelling programs
  # Those of the file alone: trimesh would make up others, round over every edge.
  if "vertex_normals" in mesh._cache and np.isfinite(mesh.vertex_normals).all():
    normals = mesh.vertex_normals @ np.linalg.inv(transform[:3, :3])
    vertices = np.concatenate([places, normals.astype(np.float32), uv], 1)
    return Part(vertices, faces.astype(np.int32), color, texture)
  return Part(*_smoothed(places, faces, uv), color, texture)


def _material(material, texture_size: int):
  """(colour, texture) of a material of OBJ (MTL) or glTF."""
  image = getattr(material, "baseColorTexture", None)
  if image is None:
    image = getattr(material, "image", None)
  color = getattr(material, "baseColorFactor", None)
  color = _floats(material.main_color if color is None else color)
  color = (*color[:3], color[3] * _opacity(getattr(material, "kwargs", None) or {}))
  if image is None:
    return color, None
  if getattr(material, "alphaMode", None) == "OPAQUE":
    image = image.convert("RGB")
  if max(color[:3]) < 0.05:  # exporters of MTL write Kd 0 0 0 beside a texture
    color = (1.0, 1.0, 1.0, color[3])
  image = image.convert("RGBA")
  image.thumbnail((texture_size, texture_size), Image.Resampling.BOX)
  return color, np.ascontiguousarray(np.asarray(image)[::-1])


def _opacity(mtl: dict) -> float:
  """Of a material of MTL, which says opacity (d) or transparency (Tr); trimesh 5.2 uses neither."""
  try:
    if "d" in mtl:
      return float(np.clip(float(np.ravel(mtl["d"])[-1]), 0, 1))
    if "tr" in mtl:
      return float(np.clip(1 - float(np.ravel(mtl["tr"])[-1]), 0, 1))
  except ValueError:
    pass
  return 1.0


def _floats(color) -> tuple[float, float, float, float]:
  values = np.asarray(color).ravel()
  values = values / 255.0 if values.dtype.kind in "iu" else values.astype(float)
  values = [*np.clip(values, 0, 1), 1.0][:4] if len(values) < 4 else np.clip(values[:4], 0, 1)
  return tuple(map(float, values))


def _smoothed(places, faces, uv):
  """(vertices, faces) with normals: a corner's is the mean of those faces at its place that are
  less than 45 degrees off its own.

  Vertices are at one place where their coordinates are equal, whatever their texture coordinates.
  """
  corners = places[faces].astype(np.float64)
  of_face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # area-weighted
  flat = _unit(of_face)
  place = np.unique(_hashes(places), return_inverse=True)[1][faces].ravel()
  order = np.argsort(place, kind="stable")
  _, start, count = np.unique(place[order], return_index=True, return_counts=True)
  # All pairs (a, b) of corners at one place; fans of very many triangles count the first ones.
  around = np.minimum(count, _MOST_AROUND)
  pairs = np.repeat(around, count)
  a = np.repeat(order, pairs)
  ends = np.cumsum(pairs)
  within = np.arange(ends[-1]) - np.repeat(ends - pairs, pairs)
  b = order[np.repeat(np.repeat(start, count), pairs) + within]
  near = np.einsum("pi,pi->p", flat[a // 3], flat[b // 3]) > _CREASE
  a, b = a[near], b[near]
  normals = _unit(np.stack([
    np.bincount(a, of_face[b // 3, axis], len(place)) for axis in range(3)
  ], 1))  # fmt: skip
  index = faces.ravel()
  like = np.concatenate([index[:, None], np.rint(normals * 256)], 1)
  first, vertex = np.unique(_hashes(like), return_index=True, return_inverse=True)[1:]
  vertices = np.concatenate([places[index[first]], normals[first], uv[index[first]]], 1)
  return vertices.astype(np.float32), vertex.reshape(-1, 3).astype(np.int32)


def _merged(part: Part, size: int) -> Part:
  """The part with vertices in cells of half a pixel merged, and triangles without area dropped.

  Vertices of a cell share their mean place, so that no crack opens; of these, those with a like
  normal and texture coordinates become one.
  """
  places, rest = part.vertices[:, :3], part.vertices[:, 3:]
  cells = np.floor(places * size).astype(np.float32)  # radius 1 is at most about size / 2 pixels
  cell, count = np.unique(_hashes(cells), return_inverse=True, return_counts=True)[1:]
  mean = np.stack([np.bincount(cell, places[:, axis]) for axis in range(3)], 1) / count[:, None]
  like = np.concatenate([cell[:, None], np.rint(rest * (2, 2, 2, 32, 32))], 1)
  first, vertex = np.unique(_hashes(like), return_index=True, return_inverse=True)[1:]
  vertices = np.concatenate([mean[cell[first]], rest[first]], 1).astype(np.float32)
  corners = np.sort(cell[part.faces], 1)
  faces = vertex[part.faces][(np.diff(corners, axis=1) > 0).all(1)]
  if not len(faces):
    return part
  return part._replace(vertices=vertices, faces=faces.astype(np.int32))


def _hashes(rows: np.ndarray) -> np.ndarray:
  """uint64 [n], equal for equal rows of float32 [n, k]; sorting the rows themselves is slow."""
  bits = np.ascontiguousarray(rows + 0.0, np.float32).view(np.uint32).astype(np.uint64)
  mixed = np.zeros(len(bits), np.uint64)
  for column in bits.T:
    mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
  return mixed


def shadow_mesh(parts: list[Part], cells: int = 48):
  """(places float32 [k, 3], faces int32 [m, 3]) of all parts, in cells of 1 / `cells` merged."""
  places = np.concatenate([part.vertices[:, :3] for part in parts])
  starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
  faces = np.concatenate([part.faces + start for part, start in zip(parts, starts)])
  first, cell = np.unique(
    _hashes(np.floor(places * cells)), return_index=True, return_inverse=True
  )[1:]
  corners = np.sort(cell[faces], 1)
  kept = cell[faces][(np.diff(corners, axis=1) > 0).all(1)]
  return places[first], kept.astype(np.int32)


def used_places(part: Part) -> np.ndarray:
  """float32 [k, 3]: the places of the vertices that belong to triangles."""
  used = np.zeros(len(part.vertices), bool)
  used[part.faces] = True
  return part.vertices[used, :3]


def _unit(vectors):
  return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-20)


def _upright(parts: list[Part], model: Model) -> list[Part]:
  """Turned and stretched as the catalogue says, standing on y = 0, of radius 1."""
  turn = np.eye(3)
  if len(model.rotation) == 9:
    turn = np.reshape(model.rotation, (3, 3))
  used = [used_places(part) @ turn.T for part in parts]
  low = np.min([places.min(0) for places in used], 0)
  high = np.max([places.max(0) for places in used], 0)
  stretch = np.ones(3)
  if len(model.extent) == 3 and (high - low).min() > 0:
    stretch = np.asarray(model.extent) / (high - low)
  middle = (low + high) / 2
  radius = max(np.linalg.norm((places - middle) * stretch, axis=1).max() for places in used)
  if not radius > 0:
    raise DataError("has no extent")
  matrix = (stretch / radius)[:, None] * turn
  shift = -middle * stretch / radius
  shift[1] += (high[1] - low[1]) / 2 * stretch[1] / radius
  normal_matrix = np.linalg.inv(matrix).T
  moved = []
  for part in parts:
    vertices = part.vertices.astype(np.float64)
    vertices[:, :3] = vertices[:, :3] @ matrix.T + shift
    vertices[:, 3:6] = _unit(vertices[:, 3:6] @ normal_matrix.T)
    moved.append(part._replace(vertices=vertices.astype(np.float32)))
  return moved
