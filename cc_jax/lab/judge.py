"""The judge: reads the factors of a subjects3d picture, so that generated pictures can be scored.

A small convolutional network trained on renders of its own (`configs/subjects3d_judge.py`); it
shares neither weights nor training pictures with the encoders that condition the adapter.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cc_jax.errors import UserError
from cc_jax.models.layers import GroupNorm
from cc_jax.models.params import path_name
from data_pipeline.subjects3d import factors as world

SHIPPED = Path(__file__).parents[1] / "assets" / "subjects3d-judge.safetensors"
# Categorical factors and how many values each has.
CATEGORIES = dict(
    class_id=len(world.CLASSES), color1=len(world.COLORS), color2=len(world.COLORS),
    pattern=len(world.PATTERNS), pattern_color=len(world.COLORS), scene=len(world.SCENES),
    hat=1 + len(world.COLORS), style=len(world.STYLES))
CONTINUOUS = ("size", "x", "y")
INTRINSIC = ("class_id", "color1", "color2", "pattern", "pattern_color")  # of the individual
CONTEXT = ("scene", "style", "hat")  # what a prompt may ask for
AZIMUTH_BINS = 8  # centred on 0, 45, ... degrees
# Every head and how many numbers it gives.
HEADS = dict(CATEGORIES, azimuth=AZIMUTH_BINS, **dict.fromkeys(CONTINUOUS, 1))
_FORMAT = "cc_jax-judge-2"


def _norm(channels: int, rngs: nnx.Rngs) -> GroupNorm:
  return GroupNorm(channels, groups=8, epsilon=1e-6, dtype=None, param_dtype=jnp.float32, rngs=rngs)


class ResBlock(nnx.Module):
  """Pre-activation residual block; `stride` 2 halves the picture."""

  def __init__(self, channels_in: int, channels: int, stride: int, *, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
    self.norm1 = _norm(channels_in, rngs)
    self.conv1 = conv(channels_in, channels, strides=stride)
    self.norm2 = _norm(channels, rngs)
    self.conv2 = conv(channels, channels)
    self.skip = nnx.Conv(channels_in, channels, (1, 1), strides=stride, rngs=rngs)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    h = self.conv1(nnx.silu(self.norm1(x)))
    return self.skip(x) + self.conv2(nnx.silu(self.norm2(h)))


class FactorJudge(nnx.Module):
  """64x64 picture -> logits of each categorical factor and of azimuth's bins, size and place."""

  def __init__(self, width: int = 32, *, rngs: nnx.Rngs):
    self.width = width
    self.stem = nnx.Conv(4 * 3, width, (3, 3), rngs=rngs)
    shapes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1),
              (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
    self.blocks = nnx.List([ResBlock(*shape, rngs=rngs) for shape in shapes])
    self.norm = _norm(4 * width, rngs)
    # 8x8 places matter for size and place, so they are kept, in few channels.
    self.reduce = nnx.Conv(4 * width, 8, (1, 1), rngs=rngs)
    self.hidden = nnx.Linear(8 * 4 * width + 8 * 64, 256, rngs=rngs)
    self.heads = nnx.Dict({name: nnx.Linear(256, n, rngs=rngs) for name, n in HEADS.items()})

  def __call__(self, x: Float[Array, "b 64 64 3"]) -> dict[str, Float[Array, "b n"]]:
    """`x` in [-1, 1]."""
    b, h, w, c = x.shape
    # Two by two pixels become channels: patterns are as fine as that.
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    h = self.stem(x.reshape(b, h // 2, w // 2, 4 * c))
    for block in self.blocks:
      h = block(h)
    h = nnx.silu(self.norm(h))
    b, c = h.shape[0], h.shape[-1]
    # Averages over the four quarters and maxima over the whole: what and roughly where.
    quarters = h.reshape(b, 2, 4, 2, 4, c).mean((2, 4)).reshape(b, 4 * c)
    peaks = h.reshape(b, 2, 4, 2, 4, c).max((2, 4)).reshape(b, 4 * c)
    places = self.reduce(h).reshape(b, -1)
    h = nnx.silu(self.hidden(jnp.concatenate([quarters, peaks, places], -1)))
    return {name: head(h) for name, head in self.heads.items()}


def is_sketch(factors: world.Factors) -> np.ndarray:
  """Which pictures have no colours, bool [n]."""
  return factors.style == world.STYLES.index("sketch")


def has_front(factors: world.Factors) -> np.ndarray:
  """Which pictures show a class that has a front, and so an azimuth, bool [n]."""
  return np.isin(factors.class_id, [world.CLASSES.index(c) for c in world.CLASSES_WITH_FRONT])


def visible(
    factors: world.Factors, coverage: np.ndarray, *, cut_out: bool = False
) -> dict[str, np.ndarray]:
  """Which factors can be seen in each picture: {factor: bool [n]}.

  `coverage` float [n,4] as the renderer returns it. A sketch has no colours; a second colour or a
  pattern needs some pixels; the symmetric classes have no front. `cut_out`: if the subjects are cut
  out on white.
  """
  always = np.ones(len(factors.class_id), bool)
  coloured = ~is_sketch(factors)
  plain = factors.pattern == world.PATTERNS.index("plain")
  patterned = plain | (coverage[:, 3] >= 0.015)
  seen = dict(
      class_id=always, color1=coloured & (coverage[:, 1] >= 0.01),
      color2=coloured & (coverage[:, 2] >= 0.01), pattern=coloured & patterned,
      pattern_color=coloured & ~plain & patterned, scene=always, hat=coloured, style=always,
      azimuth=has_front(factors), size=always, x=always, y=always)
  return seen | (dict.fromkeys(world.CUTOUT_HIDES, ~always) if cut_out else {})


def factor_loss(outputs: Mapping[str, Array], targets: Mapping[str, Array],
                seen: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
  """Sum of cross-entropies and squared errors, each averaged over pictures that show the factor.

  Of those of `HEADS` that are in `outputs`. An azimuth between two bins is divided between them: a
  squared error would make a picture that could be a front or a back a side. Also returns the
  categorical accuracies.
  """

  def mean(values, name):
    weight = seen[name].astype(jnp.float32)
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1)

  loss, accuracy = 0.0, {}
  units = dict(size=0.3, x=0.1, y=0.1)
  for name, output in outputs.items():
    if name in CATEGORIES:
      log_p = jax.nn.log_softmax(output)
      loss += mean(-jnp.take_along_axis(log_p, targets[name][:, None], 1)[:, 0], name)
      accuracy[name] = mean(jnp.argmax(log_p, 1) == targets[name], name)
    elif name == "azimuth":
      position = targets[name][:, None] * AZIMUTH_BINS / (2 * jnp.pi) - jnp.arange(AZIMUTH_BINS)
      away = jnp.abs((position + AZIMUTH_BINS / 2) % AZIMUTH_BINS - AZIMUTH_BINS / 2)
      divided = jnp.maximum(1 - away, 0)  # [b, bins], sums to 1
      loss += mean(-jnp.sum(divided * jax.nn.log_softmax(output), 1), name)
    else:
      loss += mean(jnp.square((output[:, 0] - targets[name]) / units[name]), name) * 0.3
  return loss, accuracy


def degrade(images: Float[Array, "b h w 3"], key: Array) -> Float[Array, "b h w 3"]:
  """Random blur, noise and contrast: generated pictures are softer than renders."""
  blur_key, noise_key, level_key, gain_key = jax.random.split(key, 4)
  b, h, w, c = images.shape
  small = images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
  soft = jax.image.resize(small, images.shape, "linear")
  mix = jnp.maximum(jax.random.uniform(blur_key, (b, 1, 1, 1), minval=-0.5), 0)
  level = 0.12 * jnp.maximum(jax.random.uniform(level_key, (b, 1, 1, 1), minval=-0.5), 0)
  gain = jax.random.uniform(gain_key, (b, 1, 1, 1), minval=0.9, maxval=1.1)
  noisy = images + mix * (soft - images) + level * jax.random.normal(noise_key, images.shape)
  return jnp.clip(gain * noisy, -1, 1)


def save_judge(judge: FactorJudge, file: Path, accuracy: Mapping[str, float]) -> None:
  """Writes the judge in float16 with its accuracy per factor in the metadata."""
  flat = {_name(path): np.asarray(leaf, np.float16)
          for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(judge, nnx.Param))}
  file.parent.mkdir(parents=True, exist_ok=True)
  save_file(flat, file, dict(format=_FORMAT, width=str(judge.width),
                             accuracy=json.dumps(dict(accuracy))))


def load_judge(file: Path = SHIPPED) -> tuple[FactorJudge, dict[str, float]]:
  """The judge and its accuracy per factor on fresh renders. Raises UserError for another file."""
  try:
    with safe_open(file, "numpy") as stored:
      metadata = stored.metadata() or {}
      if metadata.get("format") != _FORMAT:
        raise UserError(f"{file} is not a judge; use the shipped {SHIPPED.name}")
      flat = {name: stored.get_tensor(name) for name in stored.keys()}
  except (OSError, SafetensorError) as error:
    raise UserError(f"cannot read the judge {file} ({error}); reinstall cc_jax") from error
  width = int(metadata["width"])
  abstract = nnx.eval_shape(lambda: FactorJudge(width, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(abstract)
  state = jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.asarray(flat[_name(path)].astype(leaf.dtype)), state)
  return nnx.merge(graph, state), json.loads(metadata["accuracy"])


def read_both_ways(judge: FactorJudge, x: Float[Array, "b 64 64 3"]) -> dict[str, Array]:
  """Means of the outputs for a picture and its mirror image, whose azimuth and x change signs."""
  plain, mirrored = judge(x), judge(x[:, :, ::-1])
  mirrored["azimuth"] = mirrored["azimuth"][:, -jnp.arange(AZIMUTH_BINS) % AZIMUTH_BINS]
  mirrored["x"] = -mirrored["x"]
  return {name: (plain[name] + mirrored[name]) / 2 for name in plain}


@functools.partial(jax.jit, static_argnums=0)
def _read(graph, state, x):
  return read_both_ways(nnx.merge(graph, state), x)


def read(judge: FactorJudge, images: np.ndarray, *, batch: int = 64) -> dict[str, np.ndarray]:
  """Reads pictures uint8 [n,h,w,3]: categories int [n], azimuth radians [n], size, x, y [n].

  Pictures of another size than the judge's 64 pixels are resized (bicubic).
  """
  if images.shape[1:3] != (64, 64):
    images = np.stack([Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)
                       for image in images])
  graph, state = nnx.split(judge)
  rows = []
  for start in range(0, len(images), batch):
    chunk = images[start : start + batch]
    padded = np.concatenate([chunk, np.zeros((batch - len(chunk), *chunk.shape[1:]), np.uint8)])
    out = _read(graph, state, jnp.asarray(padded, jnp.float32) / 127.5 - 1)
    rows.append({name: np.asarray(value)[: len(chunk)] for name, value in out.items()})
  out = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
  reading = {name: out[name].argmax(1) for name in CATEGORIES}
  reading["azimuth"] = likeliest_angle(out["azimuth"])
  return reading | {name: out[name][:, 0] for name in CONTINUOUS}


def agreement(reading: Mapping[str, np.ndarray], truth: world.Factors | Mapping[str, np.ndarray],
              seen: Mapping[str, np.ndarray], names=INTRINSIC) -> dict[str, np.ndarray]:
  """Per factor, float [n]: 1 where the reading is the truth, 0 where not, NaN where not `seen`."""
  truth = truth._asdict() if isinstance(truth, world.Factors) else truth
  return {name: np.where(seen[name], (reading[name] == truth[name]).astype(float), np.nan)
          for name in names}


def share(agreements: Mapping[str, np.ndarray]) -> np.ndarray:
  """Share of its visible factors that agree, of each picture, [n]; NaN where none is visible."""
  table = np.stack(list(agreements.values()))
  counted = np.sum(~np.isnan(table), axis=0)
  return np.where(counted > 0, np.nansum(table, axis=0) / np.maximum(counted, 1), np.nan)


def likeliest_angle(logits: np.ndarray) -> np.ndarray:
  """Logits of azimuth's bins [n,8] -> radians [n].

  The mean direction in the three neighbouring bins with the most probability: a second mode far
  away does not move it.
  """
  p = np.exp(logits - logits.max(1, keepdims=True))
  three = p + np.roll(p, 1, 1) + np.roll(p, -1, 1)
  window = (three.argmax(1)[:, None] + np.arange(-1, 2)) % AZIMUTH_BINS
  p = np.take_along_axis(p, window, 1)
  return np.angle(np.sum(p * np.exp(2j * np.pi * window / AZIMUTH_BINS), 1))


def azimuth_bin(azimuth: np.ndarray) -> np.ndarray:
  """Radians -> one of 8 bins centred on 0, 45, ... degrees."""
  return np.round(azimuth * AZIMUTH_BINS / (2 * np.pi)).astype(int) % AZIMUTH_BINS


def accuracy(reading: Mapping[str, np.ndarray], factors: world.Factors,
             coverage: np.ndarray) -> dict[str, float]:
  """How often the judge is right where the factor is visible.

  Categories: share of equal readings. azimuth: share within one of 8 bins. size, x, y: correlation.
  """
  seen = visible(factors, coverage)
  scores = {name: float(np.mean((reading[name] == getattr(factors, name))[seen[name]]))
            for name in CATEGORIES}
  bins = (azimuth_bin(reading["azimuth"]) - azimuth_bin(factors.azimuth)) % AZIMUTH_BINS
  near = np.minimum(bins, AZIMUTH_BINS - bins) <= 1
  scores["azimuth"] = float(np.mean(near[seen["azimuth"]]))
  for name in CONTINUOUS:
    scores[name] = float(np.corrcoef(reading[name], getattr(factors, name))[0, 1])
  return scores


def _name(path) -> str:
  return path_name(path, ".").removesuffix(".value")
