"""DINO-I, and similarity by DINOv2 and DINOv3: cosines of the class token after the last norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from flax import nnx
from jax.sharding import Mesh

from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError
from cc_jax.metrics.model_folder import (
  Expected,
  folder_hash,
  named_in_errors,
  read_config,
  read_json,
)
from cc_jax.metrics.preprocessing import Preprocessing
from cc_jax.metrics.scorer import Scorer, vit_name
from cc_jax.models.clip_pixels import processor_from_dict
from cc_jax.models.dino import Dino, DinoConfig
from cc_jax.models.dinov3 import Dinov3, Dinov3Config
from cc_jax.models.rngs import abstract

_METHODS = {2: "linear", 3: "cubic"}  # Pillow's numbers in preprocessor_config.json


class DinoScorer(Scorer):
  """`image_features` are unit vectors; the score is their product.

  A subclass says which network and how its reference prepares pictures.
  """

  expected: ClassVar[Expected]
  family: ClassVar[str]
  config_class: ClassVar[Any] = DinoConfig
  network: ClassVar[Callable[..., nnx.Module]] = Dino

  @classmethod
  def load(cls, folder: Path, *, batch_size: int = 32, mesh: Mesh | None = None) -> DinoScorer:
    """Reads a folder of transformers.

    Raises:
      UserError: of another model, incomplete, or with tensors that are missing or left over.
    """
    values = read_config(folder, cls.expected)
    with named_in_errors(folder):
      config = cls.config_class.from_dict(values)
      file = folder / "preprocessor_config.json"
      preprocessing = cls.preprocessing_of(config, read_json(file) if file.is_file() else {})
      module = load_weights(abstract(lambda rngs: cls.network(config, rngs=rngs)), folder)
    scorer = cls(module, folder, folder_hash(folder), batch_size=batch_size, mesh=mesh,
                 preprocessing=preprocessing)  # fmt: skip
    scorer.config = config
    return scorer

  @classmethod
  def preprocessing_of(cls, config: Any, file: Mapping[str, Any]) -> Preprocessing:
    """By the config of the network and what preprocessor_config.json says ({} without it)."""
    raise NotImplementedError

  def _what(self) -> str:
    return (
      f"{self.family} {vit_name(self.config)} ({self.name}), CLS after the last norm, cosine times "
      f"1; {self.preprocessing.describe()}"
    )

  _image_network = staticmethod(lambda module, pixels: module(pixels).embedding)


class DinoV1Scorer(DinoScorer):
  """DINO-I: ViT-S/16; Resize(256, bicubic), CenterCrop(224), ImageNet's mean and std.

  The preprocessing is DreamBooth's (google/dreambooth issue 3, as MagicBrush has it), not that of
  the folder's preprocessor_config.json, which resizes to 224 by a bilinear filter.
  """

  kind = "dino"
  family = "DINO v1"
  expected = Expected("dino", ("ViTModel",), ("vit",), "facebook/dino-vits16")

  @classmethod
  def preprocessing_of(cls, config, file):
    edge = config.image_size * 256 // 224
    return Preprocessing(config.image_size, edge, **Dino.normalisation, crop="round", alpha="drop")


class DinoV2Scorer(DinoScorer):
  """DINOv2's CLS, prepared as preprocessor_config.json says; without it edge 256, crop 224."""

  kind = "dinov2"
  family = "DINOv2"
  expected = Expected("dinov2", ("Dinov2Model",), ("dinov2",), "facebook/dinov2-small")

  @classmethod
  def preprocessing_of(cls, config, file):
    published = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224}}
    default = {**Dino.normalisation, "size": 224}
    processor = processor_from_dict({**published, **file}, default, any_size=True)
    return Preprocessing(
      processor["size"], processor["shortest_edge"], processor["mean"], processor["std"],
      method=processor["method"],
    )


class DinoV3Scorer(DinoScorer):
  """DINOv3's CLS: both sides resized to 224, bilinear, before the values are rounded to bytes."""

  kind = "dinov3"
  family = "DINOv3"
  config_class, network = Dinov3Config, Dinov3
  expected = Expected(
    "dinov3", ("DINOv3ViTModel",), ("dinov3_vit",), "facebook/dinov3-vits16-pretrain-lvd1689m"
  )

  @classmethod
  def preprocessing_of(cls, config, file):
    size = file.get("size", {"height": 224, "width": 224})
    sides = {size.get("height"), size.get("width")} if isinstance(size, dict) else {None}
    resample, crop = file.get("resample", 2), file.get("do_center_crop")
    if len(sides) != 1 or not isinstance(*sides, int) or crop or resample not in _METHODS:
      raise UserError(
        f"preprocessor_config.json: size {size}, resample {resample}, do_center_crop {crop}; for "
        f"DINOv3 we have one height and width, resample in {list(_METHODS)}, no crop"
      )
    mean, std = (
      tuple(file.get(f"image_{key}", Dino.normalisation[key])) for key in ("mean", "std"))
    return Preprocessing(*sides, None, mean, std, method=_METHODS[resample], in_floats=True)
