"""Where the parts of a Stable Diffusion base are: in a folder, in one file, or on the hub.

  model_index.json    which class each of the folders below is of
  unet/ vae/          config.json, diffusion_pytorch_model.safetensors
  text_encoder/ ...   config.json, model.safetensors; SDXL has text_encoder_2/ as well
  tokenizer/ ...      vocab.json, merges.txt, tokenizer_config.json
  scheduler/          scheduler_config.json
  image_encoder/      CLIP's or DINO's, with feature_extractor/preprocessor_config.json

A single .safetensors file in the original key format (cc_jax.bases.ldm_names) holds the networks
only. Tokenizers, and a scheduler's config if there is one, are looked for in the folder named like
the file without its suffix, in the file's own folder, and then in the published model on the hub.

cc_jax.bases.base makes networks of what is found here.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from flax import nnx

from cc_jax.bases import download as downloads
from cc_jax.bases import ldm_configs, ldm_names
from cc_jax.bases.tensor_files import open_tensors
from cc_jax.diffusion.schedule import NoiseSchedule
from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import processor_from_dict
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.models.dino import Dino, DinoConfig
from cc_jax.models.image_encoder import ImageEncoder
from cc_jax.models.unet import UNet2DCondition
from cc_jax.models.unet_config import UNetConfig
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig

ASSETS = Path(__file__).parents[1] / "assets"


class Network(NamedTuple):
  """How one of our classes is stored."""

  config: type
  stem: str  # of the file of its weights
  architectures: tuple[str, ...]  # classes of model_index.json and config.json that it is


NETWORKS = {
  UNet2DCondition: Network(UNetConfig, "diffusion_pytorch_model", ("UNet2DConditionModel",)),
  AutoencoderKL: Network(AutoencoderKLConfig, "diffusion_pytorch_model", ("AutoencoderKL",)),
  CLIPTextModel: Network(CLIPTextConfig, "model", ("CLIPTextModel", "CLIPTextModelWithProjection")),
  CLIPVisionModel: Network(
    CLIPVisionConfig, "model", ("CLIPVisionModel", "CLIPVisionModelWithProjection")
  ),
  Dino: Network(DinoConfig, "model", ("ViTModel", "Dinov2Model")),
}
COMPONENTS = {
  "unet": UNet2DCondition,
  "vae": AutoencoderKL,
  "text_encoder": CLIPTextModel,
  "text_encoder_2": CLIPTextModel,
  "image_encoder": ImageEncoder,
}
_REQUIRED = ("unet", "vae", "text_encoder")
_OTHERS = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")


def network_class(part: str, architecture: str) -> type[nnx.Module]:
  """Our class for a component; raises UserError if we have none of that architecture."""
  networks = ((cls, n) for cls, n in NETWORKS.items() if issubclass(cls, COMPONENTS[part]))
  classes = {name: cls for cls, network in networks for name in network.architectures}
  if architecture not in classes:
    raise UserError(f"{part} is a {architecture}; we have {', '.join(classes)}")
  return classes[architecture]


def resolve_base(name: str | Path, *, weights: bool = True) -> Path:
  """The folder or file of a base: a path, the name of one inside the package, or a hub id.

  A hub id, `owner/name[@revision]` or `owner/name/file.safetensors[@revision]`, is downloaded, or
  taken from the hub's cache (cc_jax.bases.download); of a folder without its weights, if the caller
  needs none.

  Raises:
    UserError: it is none of these.
  """
  for path in (Path(name), ASSETS / name):
    if path.exists():
      return path
  if downloads.is_hub_id(str(name)):
    return _download(str(name), weights)
  shipped = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))
  raise UserError(
    f"base {str(name)!r} is no folder or file and not one of the package's ({shipped}); give a "
    "path, or a hub id as owner/name"
  )


@dataclasses.dataclass
class BaseFiles:
  """Where the parts of a base are."""

  name: str
  folder: Path  # of the tokenizers
  configs: dict[str, Any]  # component -> our config
  weights: dict[str, Path]  # component -> its folder, or the file that has them all
  scheduler: dict[str, Any]
  checkpoint: ldm_names.Checkpoint | None = None  # what that file is
  processor: dict[str, Any] | None = None
  unused: tuple[str, ...] = ()
  force_zeros_for_empty_prompt: bool = False

  @property
  def classes(self) -> dict[str, type[nnx.Module]]:
    """component -> our class."""
    of_config = {network.config: cls for cls, network in NETWORKS.items()}
    return {part: of_config[type(config)] for part, config in self.configs.items()}

  def open(
    self, stack: contextlib.ExitStack, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
  ) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `load_weights` reads each component from, and what a single file holds besides."""
    sources: dict[str, Any] = dict(self.weights)
    if self.checkpoint is None:
      return sources, ()
    file = self.weights["unet"]
    tensors = open_tensors(file, stack)
    stored, used = tensors.shapes(), {}
    for label in self.checkpoint.configs:
      used[label] = ldm_names.entries(self.checkpoint, label, shapes[label], stored)
    keys = [key for entries in used.values() for key, _ in entries.values()]
    unused = ldm_names.check(self.checkpoint, keys, stored, str(file))
    return sources | {label: tensors.select(entries) for label, entries in used.items()}, unused


def locate_base(
  name: str | Path, image_encoder: str | Path | None, *, weights: bool = True
) -> BaseFiles:
  """Where the parts are. Without `weights`, none are downloaded of what a hub id names."""
  path = resolve_base(name, weights=weights)
  files = _find_in_file(str(name), path) if path.is_file() else _find_in_folder(str(name), path)
  if image_encoder is not None:
    folder = _image_encoder_folder(image_encoder, weights)
    files.configs["image_encoder"] = read_config(folder, _image_encoder_class(folder))
    files.weights["image_encoder"] = folder
  if "image_encoder" in files.configs:
    files.processor = _read_processor(files)
  channels = files.configs["unet"].in_channels, files.configs["vae"].latent_channels
  if channels[0] != channels[1]:
    raise UserError(
      f"{path}: the UNet takes {channels[0]} channels, the VAE has {channels[1]}: an inpainting, "
      "depth or instruct model; use a text-to-image one"
    )
  return files


def _find_in_folder(name: str, folder: Path) -> BaseFiles:
  index = read_json(folder / "model_index.json")
  listed = {
    part: entry[1]
    for part, entry in index.items()
    if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
  }
  for part in _REQUIRED:
    if part not in listed:
      raise UserError(f"{folder / 'model_index.json'} lists no {part}; it is no Stable Diffusion")
  with _named_in_errors(folder / "model_index.json"):
    classes = {p: network_class(p, kind) for p, kind in listed.items() if p in COMPONENTS}
  configs = {part: read_config(folder / part, cls) for part, cls in classes.items()}
  known = {*COMPONENTS, *_OTHERS}
  on_disk = {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
  unused = sorted((set(listed) | on_disk) - known | on_disk & known - set(listed))
  return BaseFiles(
    name=name, folder=folder, configs=configs, weights={part: folder / part for part in configs},
    scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
    unused=tuple(f"{part}/" for part in unused),
    # Only diffusers' pipelines of SDXL know the key; there it is true where it is not written.
    force_zeros_for_empty_prompt="text_encoder_2" in configs
    and bool(index.get("force_zeros_for_empty_prompt", True)),
  )


def _find_in_file(name: str, file: Path) -> BaseFiles:
  with contextlib.ExitStack() as stack:
    checkpoint = ldm_configs.describe(open_tensors(file, stack).shapes(), str(file))
  configs = {
    part: NETWORKS[COMPONENTS[part]].config.from_dict(values)
    for part, values in checkpoint.configs.items()
  }
  beside = [f for f in (file.with_suffix(""), file.parent) if (f / "tokenizer").is_dir()]
  if beside:
    folder = beside[0]
  else:
    try:
      folder = downloads.fetch_folder(checkpoint.repository, ("tokenizer*/*",))
    except UserError as error:
      raise UserError(
        f"{file} needs a tokenizer, which no such file holds; put the folder tokenizer/ of "
        f"{checkpoint.repository} (SDXL: tokenizer_2/ too) beside it; {error}"
      ) from error
  scheduler = checkpoint.scheduler
  if beside and (folder / "scheduler").is_dir():
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file)
    with _named_in_errors(scheduler_file):
      schedule = NoiseSchedule.from_config(scheduler, prediction_type=checkpoint.predicts)
    scheduler["prediction_type"] = schedule.prediction_type
  elif checkpoint.kind == "sd2" and checkpoint.predicts is None:
    logging.warning(
      "%s: no file says what an SD 2.x predicts; taken for v_prediction. For one that predicts the "
      "noise put its scheduler/scheduler_config.json beside its tokenizer/", file,
    )  # fmt: skip
  return BaseFiles(
    name=name, folder=folder, configs=configs, weights={part: file for part in configs},
    checkpoint=checkpoint, scheduler=scheduler,
    force_zeros_for_empty_prompt="text_encoder_2" in configs,
  )


def _download(name: str, weights: bool) -> Path:
  """What a hub id names: one weight file, or the parts of a folder that we use."""
  if Path(downloads.inside(name)).suffix:
    return downloads.fetch_file(name)
  index = read_json(downloads.fetch_index(name))
  parts = [part for part in (*COMPONENTS, *_OTHERS) if (index.get(part) or [None])[0]]
  networks = {part: network_class(part, index[part][1]) for part in parts if part in COMPONENTS}
  stems = {part: NETWORKS[cls].stem for part, cls in networks.items()}
  return downloads.fetch_base(name, parts, stems, weights=weights)


def _image_encoder_folder(name: str | Path, weights: bool) -> Path:
  """The folder of an image encoder: itself, or image_encoder/ in it; a path or a hub id."""
  folder = Path(name)
  if not folder.is_dir() and downloads.is_hub_id(str(name)):
    folder = downloads.fetch_image_encoder(str(name), weights=weights)
  return folder / "image_encoder" if (folder / "image_encoder").is_dir() else folder


def _image_encoder_class(folder: Path) -> type[ImageEncoder]:
  """What config.json says by its architectures, else by its model_type; without both, CLIP's."""
  with _named_in_errors(folder / "config.json") as file:
    values = read_json(file)
    if names := values.get("architectures"):
      return network_class("image_encoder", names[0])
    classes = (cls for cls in NETWORKS if issubclass(cls, ImageEncoder))
    kind = values.get("model_type")
    return next((cls for cls in classes if kind in cls.model_types), CLIPVisionModel)


def read_config(folder: Path, cls: type[nnx.Module]) -> Any:
  with _named_in_errors(folder / "config.json") as file:
    return NETWORKS[cls].config.from_dict(read_json(file))


def _read_processor(files: BaseFiles) -> dict[str, Any]:
  """The preprocessor_config.json beside the image encoder, or in the base's feature_extractor/."""
  encoder, cls = files.weights["image_encoder"], files.classes["image_encoder"]
  default = cls.default_processor(files.configs["image_encoder"])
  for folder in (encoder, encoder.parent / "feature_extractor"):
    file = folder / "preprocessor_config.json"
    if file.is_file():
      with _named_in_errors(file):
        return processor_from_dict(read_json(file), default, any_size=cls.any_size)
  return default


@contextlib.contextmanager
def _named_in_errors(file: Path) -> Iterator[Path]:
  """Adds the file's name to a UserError, unless it is there already."""
  try:
    yield file
  except UserError as error:
    raise error if str(file) in str(error) else UserError(f"{file}: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
  if not file.is_file():
    raise UserError(f"{file} is missing; a base is a folder in the diffusers layout")
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is no JSON ({error}); get it again") from error
  if not isinstance(values, dict):
    raise UserError(f"{file} is no JSON object; get it again")
  return values
