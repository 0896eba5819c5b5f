"""Training of the judge."""

from pathlib import Path

import numpy as np
from flax import nnx

from cc_jax.lab import judge as judge_lib
from cc_jax.pretrain.batches import to_unit
from cc_jax.pretrain.loop import fit
from data_pipeline.subjects3d.prerender import Pictures, mirror_images, prerender


def train_judge(config, workdir: Path, pictures: Pictures, mesh) -> None:
  """The judge, on pictures rendered for it alone; its accuracy is measured on fresh ones."""
  c = config.judge
  judge = judge_lib.FactorJudge(c.width, rngs=nnx.Rngs(config.seed))
  if c.init_from:
    judge, _ = judge_lib.load_judge(Path(c.init_from))
  graph, params = nnx.split(judge)
  seen = judge_lib.visible(pictures.factors, pictures.coverage)
  targets = {name: getattr(pictures.factors, name) for name in judge_lib.HEADS}

  def loss_fn(params, frozen, batch, key):
    del frozen
    images = judge_lib.degrade(to_unit(batch["images"]), key)
    outputs = nnx.merge(graph, params)(images)
    return judge_lib.factor_loss(outputs, batch["targets"], batch["seen"])

  # Sketches are drawn twice as often: they are few, and without colours the hardest.
  sketch = judge_lib.is_sketch(pictures.factors)
  order = np.concatenate([np.arange(len(sketch)), np.flatnonzero(sketch)])

  def batch_fn(rng, step):
    del step
    index = np.sort(order[rng.integers(0, len(order), c.train.batch)])
    flip = rng.random(c.train.batch) < 0.5
    images, labels = mirror_images(
        pictures.images[index], {name: value[index] for name, value in targets.items()}, flip)
    return dict(images=images, targets=labels, seen={name: seen[name][index] for name in targets})

  params = fit("judge", loss_fn, params, {}, batch_fn, c.train, workdir, config.seed, mesh)
  judge = nnx.merge(graph, params)
  fresh = prerender(workdir / "fresh", c.test_images, seed=config.seed + 1000, split="test")
  scores = judge_lib.accuracy(
      judge_lib.read(judge, fresh.images), fresh.factors, fresh.coverage)
  print("judge on fresh renders: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
  judge_lib.save_judge(judge, workdir / "judge.safetensors", scores)
