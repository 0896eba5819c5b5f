"""Pictures of subjects3d rendered once into a folder of .npy files, for training from scratch.

Adapters are trained on TFDS or pictures rendered on the fly; the networks of the base need random
access to tens of thousands of independent pictures, each seen several times.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.subjects3d import factors as factors_lib
from data_pipeline.subjects3d.bulk import render_many


class Pictures(NamedTuple):
  """n pictures: images uint8 [n,h,w,3], masks uint8 [n,h,w] (memory-mapped), coverage [n,4].

  calm bool [n]: the irrelevant factors vary little.
  """

  images: np.ndarray
  masks: np.ndarray
  coverage: np.ndarray
  factors: factors_lib.Factors
  calm: np.ndarray


def prerender(
  folder: str | Path, count: int, *, seed: int, split: str = "train", calm_ratio: float = 0.0,
  plain_ratio: float = 0.0, recombine: bool = False, processes: int | None = None,
  resolution: int = 64,
) -> Pictures:
  """Renders `count` pictures of random subjects of `split` into `folder`, or opens existing ones.

  recombine: patterns and proportions are permuted among the pictures, so that they show many more
  individuals than the split has; class and part colours stay together, as in families. The folder
  stores the arguments and the world's version; with other ones it is rendered again.
  """
  folder = Path(folder)
  recipe = dict(count=count, seed=seed, split=split, calm_share=calm_ratio,
                plain_share=plain_ratio, resolution=resolution, world=factors_lib.VERSION)
  if recombine:
    recipe["recombine"] = True
  recipe_file = folder / "recipe.json"
  if not (recipe_file.exists() and json.loads(recipe_file.read_text()) == recipe):
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file.unlink(missing_ok=True)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0x5EED]))
    calm_count = round(count * calm_ratio)
    factors = sample(rng, count, split, calm_count, plain_ratio)
    if recombine:
      factors = recombined(rng, factors)
    rendered = render_many(factors, processes=processes, resolution=resolution)
    np.save(folder / "images.npy", rendered.image)
    np.save(folder / "masks.npy", rendered.mask)
    np.savez(folder / "factors.npz", coverage=rendered.coverage, **factors._asdict())
    recipe_file.write_text(json.dumps(recipe))  # last: where it exists, the rest is complete
  with np.load(folder / "factors.npz") as file:
    fields = dict(file)
  coverage = fields.pop("coverage")
  return Pictures(
    images=np.load(folder / "images.npy", mmap_mode="r"),
    masks=np.load(folder / "masks.npy", mmap_mode="r"), coverage=coverage,
    factors=factors_lib.Factors(**fields), calm=np.arange(count) < round(count * calm_ratio),
  )


def sample(
  rng: np.random.Generator, count: int, split: str, calm_count: int, plain_ratio: float
) -> factors_lib.Factors:
  """Factors of `count` pictures of random subjects, the first `calm_count` with calm ranges.

  A fraction `plain_ratio` of them loses its pattern; a fifth of all subjects has none anyway.
  """
  table = factors_lib.subjects(split)
  parts = []
  for n, ranges in ((calm_count, "calm"), (count - calm_count, "world")):
    chosen = rng.integers(0, len(table.subject_id), n)
    subjects = type(table)(*(column[chosen] for column in table))
    parts.append(factors_lib.sample_factors(rng, subjects, ranges=ranges))
  factors = factors_lib.concatenate(parts)
  plain = rng.random(count) < plain_ratio
  return factors._replace(
    pattern=np.where(plain, factors_lib.PATTERNS.index("plain"), factors.pattern).astype(np.int32)
  )


def recombined(rng: np.random.Generator, factors: factors_lib.Factors) -> factors_lib.Factors:
  """Permutes the patterns (with their colours) and each of the proportions among the rows.

  A row keeps its pattern if the colour of the new one equals one of its part colours.
  """
  rows = len(factors.class_id)
  order = rng.permutation(rows)
  pattern, color = factors.pattern[order], factors.pattern_color[order]
  keep = (color == factors.color1) | (color == factors.color2)
  return factors._replace(
    pattern=np.where(keep, factors.pattern, pattern),
    pattern_color=np.where(keep, factors.pattern_color, color),
    **{name: getattr(factors, name)[rng.permutation(rows)] for name in ("wide", "tall", "ratio")},
  )


def flip_images(images: np.ndarray, flip: np.ndarray) -> np.ndarray:
  """Images [n,h,w,3], those of `flip` bool [n] mirrored left to right."""
  return np.where(flip[:, None, None, None], images[:, :, ::-1], images)


def mirror_images(
  images: np.ndarray, factors: dict[str, np.ndarray], flip: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(`flip_images`, the factors of the result): a mirrored picture shows the mirrored pose."""
  mirrored = {name: np.where(flip, -factors[name], factors[name]) for name in factors_lib.MIRRORED}
  return flip_images(images, flip), factors | mirrored
