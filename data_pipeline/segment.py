"""Masks of photographs that have none: a network in an ONNX file that the user names.

No network is shipped. Any that maps a picture to one mask will do; `KINDS` says how those that
people use want to be shown pictures. onnxruntime runs them, on the CPU.
"""

import dataclasses
import hashlib
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.errors import DataError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Kind:
  """How a family of networks wants its input: (picture / scale - mean) / std, RGB, side x side.

  `by_brightest`: the scale is the picture's largest value, else 255. `side` counts where the file
  leaves it open. `names`: parts of file names that tell the family.
  """

  side: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  by_brightest: bool
  names: tuple[str, ...]


# Sources: u2net: xuebinqin/U-2-Net, data_loader.py (ToTensorLab), and danielgatis/rembg,
# sessions/base.py and u2netp.py; isnet: xuebinqin/DIS, Inference.ipynb, and imgly's
# (RGB - 128) / 256, which differs by 0.002; birefnet: rembg, sessions/birefnet_general.py and
# bria_rmbg.py. Where two fit a name the first counts.
KINDS = {
  "birefnet": Kind(1024, *_IMAGENET, False, ("birefnet", "rmbg-2", "rmbg2", "rmbg_2")),
  "isnet": Kind(1024, *_HALF, False, ("isnet", "rmbg")),
  "u2net": Kind(320, *_IMAGENET, True, ("u2net", "silueta")),
}
# Where neither the user nor the name says it, the side does: imgly's ISNet is a nameless file.
_BY_SIDE = {320: "u2net", 1024: "isnet"}


class Segmenter:
  """`segmenter(picture)` is its mask; may be called from several threads.

  Args:
    file: an .onnx file, or FILE.onnx:KIND where its name and its input do not tell which of
      `KINDS` it is.
    threads: of one call; 0 = all cores. The mask of a picture depends on it in the last bits, so
      what must give the same bytes everywhere says 1.

  Raises DataError: onnxruntime or the file is missing, the file is no such network, or its kind is
  unknown.
  """

  def __init__(self, file: str, threads: int = 0):
    self.file, wanted = _split_kind(os.path.expanduser(file))
    runtime = _import_onnxruntime()
    if not os.path.isfile(self.file):
      raise DataError(f"the segmenter {self.file} is missing; name the .onnx file of a network "
                      "that finds subjects, such as u2netp.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # its advice on a graph is for who made the file
    try:
      # The one provider that every machine has, and the same masks on all of them.
      self._session = runtime.InferenceSession(
        self.file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base but Exception
      raise DataError(f"the segmenter {self.file} cannot be loaded ({_one_line(error)}); give an "
                      ".onnx file") from error
    side = self._check_input()
    self.kind = wanted or _guess_kind(self.file, side)
    self._side = side or KINDS[self.kind].side

  def _check_input(self) -> int | None:
    """The side of its input, None where the file leaves it open."""
    inputs = self._session.get_inputs()
    shape = inputs[0].shape if inputs else []
    sides = {side for side in shape[2:] if isinstance(side, int)}
    if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or len(sides) > 1:
      found = ", ".join(f"{one.name} {one.shape}" for one in inputs) or "no input"
      raise DataError(f"the segmenter {self.file} takes {found}; a network is needed that takes "
                      "one picture [1, 3, side, side]")
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    if inputs[0].type not in types:
      raise DataError(f"the segmenter {self.file} takes {inputs[0].type}; a network is needed that "
                      "takes floating point numbers")
    self._input, self._dtype = inputs[0].name, types[inputs[0].type]
    self._output = self._session.get_outputs()[0].name
    return sides.pop() if sides else None

  def __call__(self, picture: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w"]:
    """The mask of an RGB picture, soft, 255 = subject; black where the network sees none.

    Unlike others' programs it does not stretch the values to 0 ... 255: that would invent a
    subject in a picture without one. Raises DataError for a network whose output is no mask.
    """
    height, width = picture.shape[:2]
    kind = KINDS[self.kind]
    small = Image.fromarray(picture[..., :3]).resize(
      (self._side, self._side), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, np.float32)
    pixels /= max(float(pixels.max()), 1e-6) if kind.by_brightest else 255.0
    pixels = (pixels - np.float32(kind.mean)) / np.float32(kind.std)
    values = self._session.run([self._output], {
      self._input: np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], self._dtype)})[0]
    values = np.asarray(values, np.float32)
    if values.ndim not in (3, 4) or values.shape[:-2].count(1) != values.ndim - 2:
      raise DataError(f"the segmenter {self.file} gives {list(values.shape)}; a network is needed "
                      "that gives one mask [1, 1, height, width]")
    values = values.reshape(values.shape[-2:])
    if not np.isfinite(values).all():
      raise DataError(f"the segmenter {self.file} gives values that are no numbers; use another")
    if values.min() < -0.01 or values.max() > 1.01:  # of before the last sigmoid
      values = 1 / (1 + np.exp(-np.clip(values, -60, 60)))
    mask = Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))
    return np.asarray(mask.resize((width, height), Image.Resampling.BILINEAR))

  def fingerprint(self) -> str:
    """A hash of the file and its kind."""
    with open(self.file, "rb") as file:
      return f"{self.kind} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _split_kind(text: str) -> tuple[str, str]:
  """'FILE:KIND' or 'FILE'."""
  file, colon, kind = text.rpartition(":")
  if not colon or os.path.isfile(text) or "/" in kind or "\\" in kind:
    return text, ""
  if kind not in KINDS:
    raise DataError(f"the segmenter {text}: {kind!r} is no kind of network that is known here; "
                    f"write {file}:{'|'.join(sorted(KINDS))}")
  return file, kind


def _guess_kind(file: str, side: int | None) -> str:
  name = os.path.basename(file).lower()
  by_name = [kind for kind, values in KINDS.items() if any(part in name for part in values.names)]
  if by_name or side in _BY_SIDE:
    return by_name[0] if by_name else _BY_SIDE[side]
  shown = "of any size" if side is None else f"of {side} x {side} pixels"
  raise DataError(f"the segmenter {file} takes pictures {shown}, and its name does not tell how "
                  f"they are scaled; write {file}:{'|'.join(sorted(KINDS))}")


def _import_onnxruntime():
  try:
    import onnxruntime
  except ImportError:
    raise DataError(
      "onnxruntime, which runs segmenters, is not installed; pip install onnxruntime") from None
  return onnxruntime


def _one_line(error: Exception) -> str:
  text = " ".join(str(error).split())
  return text if len(text) < 200 else f"{text[:200]}..."
