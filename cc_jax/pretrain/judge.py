"""Training of the judge."""

from pathlib import Path

import numpy as np
from flax import nnx

from cc_jax.lab import judge as factors_judge
from cc_jax.pretrain import loop as fitting
from cc_jax.pretrain.batches import mirror_images, to_unit
from data_pipeline.subjects3d import factors as factors_lib
from data_pipeline.subjects3d.prerender import Pictures, prerender


def train_judge(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """The judge, on pictures rendered for it alone; its accuracy is measured on fresh ones."""
  c = config.judge
  judge = factors_judge.FactorJudge(c.width, rngs=nnx.Rngs(config.seed))
  if c.init_from:
    judge, _ = factors_judge.load_judge(Path(c.init_from))
  graph, params = nnx.split(judge)
  seen = factors_judge.visible(pictures.factors, pictures.coverage)
  targets = {name: getattr(pictures.factors, name) for name in factors_judge.HEADS}

  def loss_fn(params, frozen, batch, key):
    del frozen
    images = factors_judge.degrade(to_unit(batch["images"]), key)
    outputs = nnx.merge(graph, params)(images)
    return factors_judge.factor_loss(outputs, batch["targets"], batch["seen"])

  # Sketches come twice as often: they are few, and without colours the hardest.
  twice = pictures.factors.style == factors_lib.STYLES.index("sketch")
  order = np.concatenate([np.arange(len(twice)), np.flatnonzero(twice)])

  def batch_fn(rng, step):
    del step
    index = np.sort(order[rng.integers(0, len(order), c.train.batch)])
    flip = rng.random(c.train.batch) < 0.5
    images, labels = mirror_images(
        pictures.images[index], {name: value[index] for name, value in targets.items()}, flip)
    return dict(images=images, targets=labels, seen={name: seen[name][index] for name in targets})

  params = fitting.fit("judge", loss_fn, params, {}, batch_fn, c.train, workdir, config.seed, mesh)
  judge = nnx.merge(graph, params)
  fresh = prerender(workdir / "fresh", c.fresh, seed=config.seed + 1000, split="test")
  scores = factors_judge.accuracy(
      factors_judge.read(judge, fresh.images), fresh.factors, fresh.coverage)
  print("judge on fresh renders: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
  factors_judge.save_judge(judge, workdir / "judge.safetensors", scores)
