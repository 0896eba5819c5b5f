"""Stored features: the numbers of a run with them are those of a run without."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

import data_pipeline
from cc_jax.bases.base import load_base
from cc_jax.cache import writer
from cc_jax.errors import UserError
from cc_jax.parallel.mesh import make_mesh, shard_batch
from cc_jax.training import cached_features, inputs, loop, losses, setup
from data_pipeline import feature_cache, sampling, triples
from data_pipeline.errors import DataError

pytestmark = pytest.mark.usefixtures("quick_compile")


def write_subjects(folder, subjects=4, frames=4):
  """Boxes on noise, of other sizes than the model's; the first three frames are references."""
  rng = np.random.default_rng(0)
  for n in range(subjects):
    place = folder / f"subject_{n}"
    place.mkdir(parents=True)
    noun = tiny.NOUNS[n % len(tiny.NOUNS)]
    for f in range(frames):
      image = rng.integers(0, 256, (20, 26, 4), np.uint8)
      image[..., 3] = 0
      image[4 : 10 + f, 6 : 14 + n] = (60 * n, 40 * f, 99, 255)
      Image.fromarray(image).save(place / f"{f}.png")
    listing = {
      "class_noun": noun, "references": ["0.png", "1.png", "2.png"],
      "captions": {f"{f}.png": tiny.CAPTIONS[f % 3].format(noun) for f in range(frames)},
    }  # fmt: skip
    (place / "captions.json").write_text(json.dumps(listing))
  return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_subjects(tmp_path_factory.mktemp("cache") / "subjects")


def config_of(base, data, **changes):
  settings = dict(data__source="folder", data__name=str(data), data__placements=3,
                  data__reference_layout="random", data__holdout_subjects=1)  # fmt: skip
  return tiny.tiny_config(base, **settings | changes)
