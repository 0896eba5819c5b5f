"""Do the copying scores know how much is copied? Rendered pictures whose leakage is exact.

  python -m cc_jax.lab.copying_check --scorers=dinov2:FOLDER [--subjects=24] [--out=FILE.json]

No adapter draws here: the renderer does, with every pose and light factor moved from the picture's
own towards the reference's by the leakage, 0 to 0.6, and with the reference's scene in that share
of the pictures. What a score says of it is its Spearman correlation with the leakage, over all
pictures, with a 95 % bootstrap interval over subjects. A real drawing is blurred and wrong in other
ways too: a score that fails here fails there, the converse is not shown.
"""

import json
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float

from cc_jax import cli
from cc_jax.errors import UserError
from cc_jax.metrics.copying import background_copy, copy_score, pose_copy
from cc_jax.metrics.features import spearman
from cc_jax.metrics.scorers import load_scorer
from data_pipeline.subjects3d import factors as world
from data_pipeline.subjects3d.renderer import render

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
VIEWS = 3  # real pictures of a subject; the first is the reference
_MOVED = ("azimuth", "elevation", "x", "y", "size", "light_azimuth", "light_elevation")


def leaking(own: world.Factors, reference: world.Factors, leakage: float,
            luck: Float[np.ndarray, " n"]) -> world.Factors:
  """Factors of pictures that copy `leakage` of the reference; its scene where `luck` is less."""
  moved = {}
  for name in _MOVED:
    change = getattr(reference, name) - getattr(own, name)
    if name == "azimuth":  # an angle: the shorter way round
      change = np.angle(np.exp(1j * change))
    moved[name] = getattr(own, name) + leakage * change
  copied = luck < leakage
  scene = {name: np.where(copied, getattr(reference, name), getattr(own, name))
           for name in ("scene", "background_seed")}
  return own._replace(**moved, **scene)


def correlation(
  values: Float[np.ndarray, "levels subjects"], *, draws: int = 1000
) -> tuple[float, float, float]:
  """Spearman's correlation of the values with their level, and its interval over subjects."""
  values = values[:, ~np.isnan(values).any(0)]
  level = np.repeat(np.arange(len(values)), values.shape[1])
  rng = np.random.default_rng(0)
  picked = rng.integers(values.shape[1], size=(draws, values.shape[1]))
  drawn = [spearman(values[:, row].ravel(), level) for row in picked]
  low, high = np.percentile(drawn, [2.5, 97.5])
  return spearman(values.ravel(), level), float(low), float(high)


def check(scorer, count: int) -> dict[str, tuple[float, float, float]]:
  """Correlations by the scores' names, over `count` test subjects of subjects3d."""
  rng = np.random.default_rng(0)
  everyone = world.subjects("test")
  chosen = everyone.take(rng.permutation(len(everyone.class_id))[:count])
  shown = dict(style=0, hat=0, roll=0.0)
  views = [world.sample_factors(rng, chosen, **shown) for _ in range(VIEWS)]
  own, luck = world.sample_factors(rng, chosen, **shown), rng.random(count)
  drawn = [leaking(own, views[0], leakage, luck) for leakage in LEVELS]
  rendered = render(world.concatenate([*views, *drawn]))
  features = scorer.image_features(list(rendered.image)).reshape(VIEWS + len(LEVELS), count, -1)
  real, drawn = features[:VIEWS], features[VIEWS:]
  inverse = [255 - mask for mask in rendered.mask[:count]]
  backgrounds = scorer.image_features(
    list(rendered.image[:count]), masks=inverse, background="grey")
  found = {name: np.empty((len(LEVELS), count)) for name in ("copy score", "pose", "background")}
  for k in range(count):
    found["copy score"][:, k] = copy_score(drawn[:, k], real[:, k], 0)
    found["pose"][:, k] = pose_copy(drawn[:, k], real[:, k], 0)
    found["background"][:, k] = background_copy(
      drawn[:, k], backgrounds[k], np.delete(backgrounds, k, axis=0))
  return {name: correlation(values) for name, values in found.items()}


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_list("scorers", [], "KIND:FOLDER,... of clip, dino, dinov2 or dinov3.")
  flags.DEFINE_integer("subjects", 24, "Test subjects, at least 4.")
  flags.DEFINE_string("out", None, "A JSON file for the correlations.")


def main(argv: Sequence[str]) -> None:
  """The command."""
  del argv
  f = flags.FLAGS
  pairs = [text.partition(":")[::2] for text in f.scorers]
  if f.subjects < 4 or not pairs or not all(map(all, pairs)):
    raise UserError("give --scorers=KIND:FOLDER and --subjects=4 or more")
  scorers = [load_scorer(kind, folder) for kind, folder in pairs]
  result = {scorer.kind: check(scorer, f.subjects) for scorer in scorers}
  for kind, scores in result.items():
    for name, (value, low, high) in scores.items():
      print(f"{kind:8}{name:12}Spearman with leakage {value:+.2f} [{low:+.2f}, {high:+.2f}]")
  if f.out:
    epath.Path(f.out).write_text(json.dumps(
      dict(levels=LEVELS, subjects=f.subjects, scorers=[s.describe() for s in scorers],
           spearman=result), indent=1) + "\n")


if __name__ == "__main__":
  cli.run(main, define_flags)
