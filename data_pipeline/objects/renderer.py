"""Renders models headless: moderngl over EGL, on a GPU or by Mesa's llvmpipe on the CPU.

Four samples a pixel; the mask is the share of them that the subject covers, so that
picture = mask * subject + (1 - mask) * background, in the stored numbers. The same machine renders
the same bytes, by any number of threads or processes; another driver may differ by rounding.
"""

import os
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.objects import scene, shaders
from data_pipeline.objects.mesh import Part, shadow_mesh, used_places

SAMPLES = 4
_REACH = 3.0  # half the side of the square of floor that can have shadow
_SHADOW = 128  # pixels of it


class Picture(NamedTuple):
  """image uint8 [s, s, 3], mask uint8 [s, s] (255 = all subject) and the camera."""

  image: np.ndarray
  mask: np.ndarray
  camera: scene.Camera


class Renderer:
  """A context for pictures of `size` pixels a side; one for each process.

  Raises DataError where moderngl or EGL is missing.
  """

  def __init__(self, size: int):
    self.size = size
    self._gl = gl = _context()
    self._subject = gl.texture((size, size), 4, samples=SAMPLES)
    self._samples = gl.framebuffer(
      self._subject, gl.depth_renderbuffer((size, size), samples=SAMPLES)
    )
    self._shadow = gl.texture((_SHADOW, _SHADOW), 1)
    self._shadow.repeat_x = self._shadow.repeat_y = False
    self._shadow_buffer = gl.framebuffer(self._shadow)
    self._out = gl.framebuffer(gl.renderbuffer((size, size), 4))
    self._model = gl.program(shaders.MODEL_VERTEX, shaders.MODEL_FRAGMENT)
    self._flat = gl.program(shaders.SHADOW_VERTEX, shaders.SHADOW_FRAGMENT)
    self._screen = gl.program(shaders.SCREEN_VERTEX, shaders.BACKGROUND_FRAGMENT)
    corners = gl.buffer(np.array([-1, -1, 3, -1, -1, 3], "f4").tobytes())
    self._triangle = gl.vertex_array(self._screen, [(corners, "2f", "corner")])

  @property
  def device(self) -> str:
    """What renders, in the driver's words: 'llvmpipe (LLVM 15.0.6, 256 bits)', a GPU's name."""
    return self._gl.info["GL_RENDERER"]

  def render(self, parts: list[Part], views: list[scene.View], *, white: bool = False):
    """Yields a Picture for each view of a model; `white`: nothing but the subject, on white."""
    from moderngl import TRIANGLES

    vertices = np.concatenate([used_places(part) for part in parts]).astype(np.float64)
    uploaded = [_Uploaded(self._gl, part, self._model) for part in parts]
    shadow = _Shadow(self._gl, parts, self._flat)
    try:
      for view in views:
        camera = scene.camera(view, vertices, self.size)
        self._draw(uploaded, None if white else shadow, view, camera, TRIANGLES)
        rows = np.frombuffer(self._out.read(components=4), np.uint8)
        rows = rows.reshape(self.size, self.size, 4)[::-1]
        yield Picture(rows[..., :3].copy(), rows[..., 3].copy(), camera)
    finally:
      for part in (*uploaded, shadow):
        part.release()

  def _draw(self, uploaded, shadow, view, camera, triangles) -> None:
    """Draws a view into `_out`; without `shadow` the subject alone on white."""
    gl, kind = self._gl, scene.SCENES[view.scene]
    eye = -camera.world_to_camera[:, :3].T @ camera.world_to_camera[:, 3]
    light, tint = np.asarray(view.light), np.asarray(view.tint)
    ground_color = np.clip(np.asarray(kind.ground_color) * tint, 0, 1)

    gl.disable(gl.DEPTH_TEST | gl.CULL_FACE | gl.BLEND)
    if shadow is not None:
      self._shadow_buffer.use()
      self._shadow_buffer.clear()
      self._flat["light"], self._flat["reach"] = tuple(light), _REACH
      shadow.render(triangles)
      self._shadow.build_mipmaps()

    self._samples.use()
    self._samples.clear()
    gl.enable_only(gl.DEPTH_TEST)
    program = self._model
    program["clip"].write(_clip(camera, self.size).T.astype("f4").tobytes())
    for name, value in dict(
      eye=eye, light=light, sun=view.sun, floor_color=ground_color**2.2
    ).items():
      program[name] = tuple(map(float, value))
    program["ambient"] = view.ambient
    for part in uploaded:
      part.render(program, triangles)

    gl.disable(gl.DEPTH_TEST)
    self._out.use()
    self._subject.use(0)
    self._shadow.use(1)
    program = self._screen
    rays = camera.world_to_camera[:, :3].T @ np.linalg.inv(camera.intrinsics)
    program["rays"].write(rays.T.astype("f4").tobytes())
    for name, value in dict(
      model=0, shadow=1, eye=tuple(map(float, eye)), size=float(self.size), reach=_REACH,
      focal=float(camera.intrinsics[0, 0]), ground=scene.GROUNDS.index(kind.ground),
      back=scene.BACKS.index(kind.back), seed=view.background_seed, turn=view.turn,
      azimuth=view.azimuth, ground_color=tuple(map(float, ground_color)), flat_white=shadow is None,
      back_color=tuple(map(float, np.clip(np.asarray(kind.back_color) * tint, 0, 1))),
    ).items():  # fmt: skip
      program[name] = value
    self._triangle.render(triangles)


class _Uploaded:
  """A part's buffers and texture."""

  def __init__(self, gl, part: Part, model):
    self._vertices = gl.buffer(part.vertices.tobytes())
    self._faces = gl.buffer(np.ascontiguousarray(part.faces, np.int32).tobytes())
    self._model = gl.vertex_array(
      model, [(self._vertices, "3f 3f 2f", "place", "normal", "uv")], self._faces
    )
    self._color, self._texture = part.color, None
    if part.texture is not None:
      height, width = part.texture.shape[:2]
      self._texture = gl.texture((width, height), 4, np.ascontiguousarray(part.texture).tobytes())
      self._texture.build_mipmaps()

  def render(self, program, triangles) -> None:
    program["color"], program["textured"] = self._color, self._texture is not None
    if self._texture is not None:
      self._texture.use(0)
    self._model.render(triangles)

  def release(self) -> None:
    for thing in (self._model, self._vertices, self._faces, self._texture):
      if thing is not None:
        thing.release()


class _Shadow:
  """What casts the shadow of all parts."""

  def __init__(self, gl, parts: list[Part], flat):
    places, faces = shadow_mesh(parts)
    self._things = [gl.buffer(places.tobytes())]
    if len(faces):  # else the model is smaller than a cell
      self._things.append(gl.buffer(faces.tobytes()))
      self._things.append(gl.vertex_array(flat, [(self._things[0], "3f", "place")],
                                          self._things[1]))

  def render(self, triangles) -> None:
    for array in self._things[2:]:
      array.render(triangles)

  def release(self) -> None:
    for thing in reversed(self._things):
      thing.release()


def _clip(camera: scene.Camera, size: int) -> np.ndarray:
  """The matrix [4, 4] from the world to OpenGL's clip space, whose y points up."""
  f, cx, cy = camera.intrinsics[0, 0], *camera.intrinsics[:2, 2]
  distance = camera.world_to_camera[2, 3]
  near, far = max(distance - 2.2, 0.1), distance + 2.2
  projection = np.array([
    [2 * f / size, 0, 2 * cx / size - 1, 0],
    [0, -2 * f / size, 1 - 2 * cy / size, 0],
    [0, 0, (far + near) / (far - near), -2 * far * near / (far - near)],
    [0, 0, 1, 0],
  ])  # fmt: skip
  return projection @ np.concatenate([camera.world_to_camera, [[0, 0, 0, 1]]])


def _context():
  try:
    import moderngl
  except ImportError:
    raise DataError("moderngl is not installed; pip install moderngl trimesh") from None
  # llvmpipe in this thread: more of them gain nothing at these sizes, processes do (worker.py).
  os.environ.setdefault("LP_NUM_THREADS", "0")
  try:
    return moderngl.create_standalone_context(backend="egl", require=410)
  except Exception as error:  # glcontext raises what the loader says
    reason = " ".join(str(error).split())[:150]
    raise DataError(
      f"no headless OpenGL 4.1 over EGL ({reason}); on Debian: apt-get install libegl1 "
      "libgl1-mesa-dri"
    ) from None
