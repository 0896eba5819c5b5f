"""Folders in the hub's layout: against the libraries that own it, and every way they can be bad."""

import hashlib
import importlib
import json
import re
import shlex
import shutil

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects
from torch_parity import randomise, relative_error

from cc_jax.bases import download
from cc_jax.bases import files as layout
from cc_jax.bases.base import abstract_base, load_base, load_module, random_base
from cc_jax.bases.files import resolve_base
from cc_jax.bases.save import save_base, save_module
from cc_jax.bases.tokenizer import train_tokenizer
from cc_jax.bases.torch_names import to_torch
from cc_jax.errors import UserError
from cc_jax.models.clip_pixels import CLIP_PROCESSOR, clip_pixels
from cc_jax.models.clip_text import CLIPTextModel
from cc_jax.models.vae import AutoencoderKL
from cc_jax.training.setup import known_architecture

UNET = dict(
  sample_size=8, in_channels=4, out_channels=4, block_out_channels=[8, 16], layers_per_block=1,
  down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
  up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], norm_num_groups=4, attention_head_dim=2,
  cross_attention_dim=16, addition_embed_type="text", addition_embed_type_num_heads=4,
)  # fmt: skip
VAE = dict(
  block_out_channels=[8, 16], latent_channels=4, norm_num_groups=4, sample_size=16,
  down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
  scaling_factor=0.7,
)  # fmt: skip
TOWER = dict(
  hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
  projection_dim=12, hidden_act="gelu",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """A small random StableDiffusionPipeline with an image encoder."""
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer = train_tokenizer(["a red teapot", "a blue car"], folder, 550, 12)
  ids = dict(
    vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
  )  # fmt: skip
  text = transformers.CLIPTextConfig(**TOWER, **ids, max_position_embeddings=12)
  vision = transformers.CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
  return diffusers.StableDiffusionPipeline(
    unet=randomise(diffusers.UNet2DConditionModel(**UNET)),
    vae=randomise(diffusers.AutoencoderKL(**VAE)),
    text_encoder=randomise(transformers.CLIPTextModel(text)),
    tokenizer=tokenizer,
    scheduler=diffusers.DDIMScheduler(
      beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
      steps_offset=1,
    ),
    safety_checker=None,
    feature_extractor=transformers.CLIPImageProcessor(
      size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ),
    image_encoder=randomise(transformers.CLIPVisionModelWithProjection(vision)),
    requires_safety_checker=False,
  )  # fmt: skip


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
  """The folder that diffusers wrote."""
  folder = tmp_path_factory.mktemp("base")
  theirs.save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def base(saved):
  return load_base(saved)


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "copy")


def networks(base):
  return dict(
    unet=base.unet, vae=base.vae, text_encoder=base.text_encoders[0],
    image_encoder=base.image_encoder,
  )  # fmt: skip


def tensors(module):
  """PyTorch's names and values; transformers 5 has no `text_model.` without a projection."""
  plain = isinstance(module, CLIPTextModel) and not module.config.with_projection
  flat = to_torch(nnx.state(module, nnx.Param))
  return {name.removeprefix("text_model.") if plain else name: v for name, v in flat.items()}


def assert_bitwise(ours, torch_module):
  wanted = {name: tensor.numpy() for name, tensor in torch_module.state_dict().items()}
  assert ours.keys() == wanted.keys()
  for name, value in ours.items():
    assert value.dtype == wanted[name].dtype and np.array_equal(value, wanted[name]), name


def test_reads_what_diffusers_writes(base, theirs):
  for name, module in networks(base).items():
    assert_bitwise(tensors(module), getattr(theirs, name))
  assert base.vae.config.scaling_factor == 0.7
  assert base.scheduler_config["prediction_type"] == "v_prediction"
  assert base.tokenizers[0]("a red cat").input_ids == theirs.tokenizer("a red cat").input_ids
  assert base.image_processor["mean"] == tuple(theirs.feature_extractor.image_mean)
  assert (base.image_processor["size"], base.image_processor["shortest_edge"]) == (16, 16)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_diffusers_reads_what_we_write(base, dtype, tmp_path):
  """The very values in the stored type, every config, and the module classes."""
  save_base(base, tmp_path, dtype=dtype)
  for file in ("unet/diffusion_pytorch_model", "text_encoder/model"):
    stored = safetensors.numpy.load_file(tmp_path / f"{file}.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(dtype)}
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
    tmp_path, dtype=getattr(torch, dtype), local_files_only=True
  )
  for name, module in networks(base).items():
    wanted = {key: value.astype(dtype) for key, value in tensors(module).items()}
    assert_bitwise(wanted, getattr(pipeline, name))
  assert isinstance(pipeline.image_encoder, transformers.CLIPVisionModelWithProjection)
  assert pipeline.feature_extractor.crop_size["height"] == 16
  assert pipeline.tokenizer("a red cat").input_ids == base.tokenizers[0]("a red cat").input_ids
  assert pipeline.scheduler.config.prediction_type == "v_prediction"
  for name, settings in (("unet", UNET), ("vae", VAE), ("text_encoder", TOWER)):
    config = getattr(pipeline, name).config
    for key, value in settings.items():
      if key != "projection_dim":
        assert config[key] == value if isinstance(config, dict) else getattr(config, key) == value
  plain = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
  assert {getattr(plain, name).dtype for name in networks(base)} == {torch.float32}
  # And back.
  again = load_base(tmp_path)
  for name, module in networks(again).items():
    before = tensors(networks(base)[name])
    for key, value in tensors(module).items():
      assert np.array_equal(value, before[key].astype(dtype).astype(np.float32)), (name, key)
  assert (again.hash == base.hash) == (dtype == "float32")


def test_modules_agree_with_the_pipeline(base, tmp_path):
  """Our networks and PyTorch's from the folder that we wrote: the same numbers."""
  save_base(base, tmp_path)
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
  rng = np.random.default_rng(0)
  x, pixels = (rng.standard_normal(s).astype(np.float32) for s in ((2, 8, 8, 4), (2, 16, 16, 3)))
  ids = np.asarray(base.tokenizers[0](["a car", "a red teapot"], padding="max_length").input_ids)
  t = np.array([3, 900])
  modules = nnx.List([base.unet, base.vae, base.text_encoders[0], base.image_encoder])
  graph, params = nnx.split(modules)

  @jax.jit
  def run(params):
    unet, vae, text_encoder, image_encoder = nnx.merge(graph, params)
    text = text_encoder(ids)[0]
    return text, unet(x, t, text), vae.decode(x), image_encoder(pixels).image_embeds

  with torch.no_grad():
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    text = pipeline.text_encoder(torch.from_numpy(ids))[0]
    wanted = (
      text,
      pipeline.unet(nchw, torch.from_numpy(t), text).sample.permute(0, 2, 3, 1),
      pipeline.vae.decode(nchw).sample.permute(0, 2, 3, 1),
      pipeline.image_encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)).image_embeds,
    )
  for ours, theirs in zip(run(params), wanted, strict=True):
    assert relative_error(ours, theirs) < 1e-4


def test_dtypes_and_hash(saved, base):
  half = load_base(saved, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  for name, module in networks(half).items():
    wanted = tensors(networks(base)[name])
    for key, value in tensors(module).items():
      assert np.array_equal(value, wanted[key].astype(jnp.bfloat16)), (name, key)
  assert half.hash == base.hash  # of what is stored, not of how it is held
  assert half.unet.conv_in.dtype == jnp.bfloat16


def test_two_bases_of_one_folder_share_nothing(saved):
  """Their constructors are traced once; a change of one must not be seen in the next."""
  one, other = abstract_base(saved), abstract_base(saved)
  kernel = other.unet.conv_in.kernel.get_value()
  one.unet.conv_in.kernel.set_value(None)
  one.unet.conv_in.dtype = "changed"
  for base in (other, abstract_base(saved)):
    assert base.unet.conv_in.kernel.get_value() == kernel
    assert base.unet.conv_in.dtype == jnp.float32


def test_hash_by_hand(saved, base):
  """sha256 over the sorted tensors of all networks: name, and sha256 of type, shape and bytes."""
  lines = []
  for folder, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model"), ("image_encoder", "model")):  # fmt: skip
    stored = safetensors.numpy.load_file(saved / folder / f"{file}.safetensors")
    prefix = "text_model." if folder == "text_encoder" else ""
    for name, value in stored.items():
      digest = hashlib.sha256(f"{value.dtype} {value.shape}\n".encode() + value.tobytes())
      lines.append(f"{folder}/{prefix}{name} {digest.hexdigest()}\n")
  assert base.hash == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_bfloat16_file(base, tmp_path):
  """bfloat16 is stored, and read back without passing through another type."""
  save_module(base.text_encoders[0], tmp_path, dtype="bfloat16")
  again = load_module(tmp_path, CLIPTextModel, param_dtype=jnp.bfloat16)
  theirs = transformers.CLIPTextModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
  for name, tensor in theirs.state_dict().items():
    assert np.array_equal(tensors(again)[name].astype(np.float32), tensor.float().numpy())


def test_shards(base, copy):
  """A network in several files with an index, as large ones come; another under its fp16 name."""
  (copy / "vae" / WEIGHTS).rename(copy / "vae" / WEIGHTS.replace(".", ".fp16.", 1))
  whole = copy / "unet" / "diffusion_pytorch_model.safetensors"
  stored = safetensors.numpy.load_file(whole)
  whole.unlink()
  names = sorted(stored)
  parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
  for file, keys in parts.items():
    safetensors.numpy.save_file({key: stored[key] for key in keys}, copy / "unet" / file)
  index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
  (copy / "unet" / f"{whole.name}.index.json").write_text(json.dumps(index))
  assert load_base(copy).hash == base.hash
  (copy / "unet" / "b.safetensors").unlink()
  with pytest.raises(UserError, match="b.safetensors"):
    load_base(copy)


def test_abstract_and_random_base(copy, base):
  for file in copy.rglob("*.safetensors"):
    file.unlink()
  shutil.rmtree(copy / "tokenizer")
  abstract = abstract_base(copy, param_dtype=jnp.bfloat16)
  for name, module in networks(abstract).items():
    wanted = tensors(networks(base)[name])
    leaves = nnx.to_flat_state(nnx.state(module))
    assert len(leaves) == len(wanted)
    assert all(isinstance(leaf.get_value(), jax.ShapeDtypeStruct) for _, leaf in leaves)
    assert {leaf.dtype for _, leaf in leaves} == {jnp.bfloat16.dtype}
  assert (abstract.hash, abstract.tokenizers) == ("", ())
  # A caller can build on a whole base without a single array.
  model = nnx.eval_shape(lambda: nnx.Dict(unet=random_base(copy).unet))
  assert model["unet"].conv_in.kernel.shape == (3, 3, 4, 8)


def test_image_encoder_from_elsewhere(saved, base, copy, tmp_path):
  """A base without an image encoder takes one from another folder, in either layout."""
  index = json.loads((copy / "model_index.json").read_text())
  index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
  (copy / "model_index.json").write_text(json.dumps(index))
  assert load_base(copy).image_encoder is None
  shutil.copytree(saved / "image_encoder", tmp_path / "alone")
  for folder in (saved, saved / "image_encoder", tmp_path / "alone"):
    other = load_base(copy, image_encoder=folder)
    assert other.hash == base.hash
    assert other.image_processor["size"] == 16


def test_clip_pixels_as_transformers(base):
  """Resize, crop and normalisation; more of it in tests/test_pictures.py."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
  image = PIL.Image.fromarray(coarse).resize((60, 41), PIL.Image.Resampling.BICUBIC)
  processor = transformers.CLIPImageProcessor(
    size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
  )
  wanted = processor(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
  ours = {**base.image_processor, "shortest_edge": 20}
  got = clip_pixels(jnp.asarray(image, jnp.float32)[None] / 255, ours)
  level = 1 / 255 / min(ours["std"])
  assert np.abs(got - wanted).max() < 0.01 * level
  # Untouched pictures: exactly the normalisation.
  small = np.asarray(image)[None, :16, :16] / np.float32(255)
  exact = (small - np.array(ours["mean"])) / np.array(ours["std"])
  for same in (base.image_processor, CLIP_PROCESSOR):
    assert relative_error(clip_pixels(jnp.asarray(small), same), exact) < 1e-6


def rewrite(file, **changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file):
  file.write_bytes(file.read_bytes()[:-100])


def only_pickle(file):
  file.with_suffix(".bin").write_bytes(b"\x80\x04N.")
  file.unlink()


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
  "damage, wanted",
  [
    (lambda f: (f / "model_index.json").unlink(), r"model_index.json is missing"),
    (lambda f: (f / "model_index.json").write_text("{"), r"model_index.json is no JSON"),
    (lambda f: shutil.rmtree(f / "unet"), r"unet/config.json is missing"),
    (lambda f: (f / "vae" / WEIGHTS).unlink(), r"vae/diffusion_pytorch_model.safetensors"),
    (lambda f: truncate(f / "vae" / WEIGHTS), r"vae/diff.* is truncated"),
    (lambda f: only_pickle(f / "unet" / WEIGHTS), r"unet/diff.*\.bin is a pickle"),
    (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), r"vocab.json is missing"),
    (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), r"scheduler_config.json is m"),
    (lambda f: rewrite(f / "vae/config.json", act_fn="relu"), r"vae/config.json: .*act_fn"),
    (lambda f: rewrite(f / "text_encoder/config.json", hidden_act="x"), r"text_enc.*hidden_act"),
    (lambda f: rewrite(f / "unet/config.json", class_embed_type="x"), r"unet/conf.*class_embed_t"),
    (lambda f: rewrite(f / "feature_extractor/preprocessor_config.json", resample=0),
     r"preprocessor_config.json: resample"),
    (lambda f: rewrite(f / "model_index.json", vae=["diffusers", "AutoencoderTiny"]),
     r"vae is a AutoencoderTiny"),
    (lambda f: rewrite(f / "vae/config.json", layers_per_block=2),
     r"vae .*32 missing \(decoder.up_blocks.0.resnets.2.conv1.bias"),
    (lambda f: rewrite(f / "unet/config.json", cross_attention_dim=8),
     r"unet .*add_embedding.norm1.bias has the shape \(16,\)"),
    (lambda f: shutil.copy(f / "unet" / WEIGHTS, f / "text_encoder" / "model.safetensors"),
     r"text_encoder .*missing \(text_model.embeddings.*221 not expected \(add_embedding"),
  ],
)  # fmt: skip
def test_bad_folders(damage, wanted, copy):
  damage(copy)
  with pytest.raises(UserError, match=wanted) as error:
    load_base(copy)
  assert "\n" not in str(error.value)
  assert "copy" in str(error.value)  # the folder is named


def test_base_of_the_package(saved, tmp_path, monkeypatch):
  monkeypatch.setattr(layout, "ASSETS", saved.parent)
  assert resolve_base(saved.name) == saved
  assert resolve_base(tmp_path) == tmp_path


def test_other_errors(base, tmp_path):
  with pytest.raises(UserError, match="'nowhere/at-all' is no folder"):
    load_base("nowhere/at-all")
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    save_base(base, tmp_path / "file" / "folder")


def test_save_refuses_what_does_not_fit(base, tmp_path):
  """An overflow is no weight file, and a failed save leaves the old file as it was."""
  save_module(base.vae, tmp_path)
  before = (tmp_path / WEIGHTS).read_bytes()
  graph, params = nnx.split(base.vae)
  large = nnx.merge(graph, jax.tree.map(lambda leaf: leaf * 1e6, params))
  with pytest.raises(ValueError, match="not finite as float16"):
    save_module(large, tmp_path, dtype="float16")
  assert (tmp_path / WEIGHTS).read_bytes() == before
  assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]
  assert isinstance(load_module(tmp_path, AutoencoderKL), AutoencoderKL)


# ---- C4: hub ids in the configs, and what is said before and instead of a download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Of stable-diffusion-v1-5/stable-diffusion-v1-5, with its sizes in bytes where they matter.
PUBLISHED = {
  "unet/diffusion_pytorch_model.safetensors": 3_438_167_540,
  "text_encoder/model.safetensors": 492_265_168,
  "vae/diffusion_pytorch_model.safetensors": 334_643_268,
  "tokenizer/vocab.json": 1_059_962,
  "tokenizer/merges.txt": 524_619,
} | dict.fromkeys((
  "model_index.json", "feature_extractor/preprocessor_config.json", "text_encoder/config.json",
  "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
  "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json",
), 500)  # fmt: skip
NOT_OURS = {
  "README.md": 15_000, "v1-5-pruned.safetensors": 7_703_324_286, "v1-inference.yaml": 1_873,
  "safety_checker/model.safetensors": 1_215_981_830, "unet/diffusion_pytorch_model.bin": 1,
  "unet/diffusion_pytorch_model.fp16.safetensors": 1_719_125_304,
  "text_encoder/model.fp16.safetensors": 1, "vae/diffusion_pytorch_model.bin": 1,
  "unet/diffusion_pytorch_model.non_ema.safetensors": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_configs_name_a_commit_on_the_hub(name):
  """The ids are the hub's, their licences are known, and their shapes need no download."""
  config = importlib.import_module(f"configs.{name}").get_config()
  for id_ in (config.base, config.encoder.image_encoder):
    assert download.is_hub_id(id_)
    repository, revision = id_.split("@")
    assert re.fullmatch("[0-9a-f]{40}", revision)
    assert "/".join(repository.split("/")[:2]) in download.LICENCES
  assert download.inside(config.encoder.image_encoder) == "models/image_encoder"
  short = config.base.split("@")[0].split("/")[1]
  ids = (config.base, f"{config.base.split('@')[0]}@main", short)
  encoders = (config.encoder.image_encoder, "h94/IP-Adapter/models/image_encoder",
              "IP-Adapter/models/image_encoder")  # fmt: skip
  shapes = layout.ASSETS / "architectures"
  assert {known_architecture(id_) for id_ in ids} == {str(shapes / short)}
  assert {known_architecture(id_) for id_ in encoders} == {
    str(shapes / "IP-Adapter" / "models" / "image_encoder")}  # fmt: skip
  for folder in (shapes / short, shapes / "IP-Adapter/models/image_encoder"):
    assert folder.is_dir()


def test_a_fork_of_a_known_name_is_not_taken_for_it():
  """Only the ids in the table have the shipped shapes."""
  assert download.short_name("h94/IP-Adapter/models/image_encoder@main") == (
    "IP-Adapter/models/image_encoder")  # fmt: skip
  for name in ("me/stable-diffusion-v1-5", "stable-diffusion-v1-5", "", "/a/folder", "a b"):
    assert download.short_name(name) == name


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub with one repository, and an empty cache; `hub.files` are what it has downloaded."""

  class Hub:
    sizes, licence, error = PUBLISHED | NOT_OURS, "openrail", None
    root = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    files: list = []

    def model_info(self, repository, *, revision, files_metadata, timeout):
      if hub.error:
        raise hub.error
      assert (repository, files_metadata) == (hub.root.name[8:].replace("--", "/"), True)
      assert revision == COMMIT and timeout
      siblings = [{"rfilename": file, "size": size} for file, size in hub.sizes.items()]
      card = {"license": hub.licence} if hub.licence else None
      return huggingface_hub.ModelInfo(id=repository, sha=COMMIT, siblings=siblings, cardData=card)

    @staticmethod
    def snapshot_download(*, repo_id, revision, allow_patterns):
      if hub.error:
        raise hub.error
      for file in filter_repo_objects(hub.sizes, allow_patterns=allow_patterns):
        hub.files.append(file)
        hub.write(file)
      return str(hub.root / "snapshots" / COMMIT)

    @staticmethod
    def write(file):
      path = hub.root / "snapshots" / COMMIT / file
      path.parent.mkdir(parents=True, exist_ok=True)
      parts = dict(unet="UNet2DConditionModel", vae="AutoencoderKL", text_encoder="CLIPTextModel",
                   tokenizer="CLIPTokenizer", scheduler="PNDMScheduler", safety_checker="Checker",
                   feature_extractor="CLIPImageProcessor")  # fmt: skip
      path.write_text(json.dumps({part: ["library", name] for part, name in parts.items()}))

  hub = Hub()
  hub.files = []
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
  return hub


NAME = f"stable-diffusion-v1-5/stable-diffusion-v1-5@{COMMIT}"


def test_says_what_it_will_download(hub, capsys):
  """The bytes of what is missing, the largest files and the licence; nothing once it is there."""
  root = resolve_base(NAME)
  assert set(hub.files) == set(PUBLISHED)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"downloading 4.27 GB of {NAME} to ")
  assert "unet/diffusion_pytorch_model.safetensors 3.44 GB, text_encoder/model.safet" in line
  assert "and 8 more; licence: openrail, see https://huggingface.co/stable-diffusion-v1-5/" in line
  assert resolve_base(NAME) == root
  assert capsys.readouterr().err == ""
  (root / "vae" / WEIGHTS).unlink()
  hub.licence = None  # no model card: the table's
  resolve_base(NAME)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("downloading 0.33 GB of ") and ": vae/diff" in line
  assert "licence: creativeml-openrail-m" in line
  hub.error = HTTPError("no answer")  # that is for the download to say
  with pytest.raises(UserError, match="nor in the hub's cache .no answer.; looked for"):
    resolve_base(NAME)


def test_shapes_need_no_weights_from_the_hub(hub, capsys):
  with pytest.raises(UserError, match="unet/config.json"):  # the fake one says nothing
    abstract_base(NAME)
  assert hub.files and not any(file.endswith(".safetensors") for file in hub.files)
  assert "downloading 1.6 MB" in capsys.readouterr().err  # the vocabulary


def test_offline_error_has_the_layout_and_the_command(tmp_path, monkeypatch):
  """One line; its command fetches what is used of a published repository and nothing else."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as error:
    load_base(NAME)
  text = str(error.value)
  assert "\n" not in text
  folder = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5" / "snapshots" / COMMIT
  assert f"looked for {folder} with model_index.json, scheduler/, tokenizer/, and config" in text
  words = shlex.split(text.split("`")[1])
  assert words[:5] == ["hf", "download", NAME.split("@")[0], "--revision", COMMIT]
  assert set(words[5::2]) == {"--include"}
  fetched = filter_repo_objects(PUBLISHED | NOT_OURS, allow_patterns=words[6::2])
  assert set(fetched) == set(PUBLISHED)
  with pytest.raises(UserError, match="/snapshots/.the commit in .*/refs/main. with") as error:
    load_base("some/base")
  assert "hf download some/base --include model_index.json" in str(error.value)
  encoder = f"h94/IP-Adapter/models/image_encoder@{COMMIT}"
  with pytest.raises(UserError) as error:
    load_base("subjects3d-base", image_encoder=encoder)
  folder = tmp_path / "models--h94--IP-Adapter" / "snapshots" / COMMIT / "models" / "image_encoder"
  assert f"looked for {folder} with config.json and model.safetensors; " in str(error.value)
  assert (f"hf download h94/IP-Adapter --revision {COMMIT} --include 'models/image_encoder/*.json' "
          "--include models/image_encoder/model.safetensors`") in str(error.value)  # fmt: skip


@pytest.mark.parametrize(
  "lost",
  ["model_index.json", "unet/config.json", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"],
)
def test_a_download_that_broke_off_is_named(lost, saved, tmp_path, monkeypatch):
  """What is missing in the cache, and the command that goes on; not 'a base is a folder ...'."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  root = tmp_path / "models--some--base" / "snapshots" / COMMIT
  shutil.copytree(saved, root)
  name = f"some/base@{COMMIT}"
  assert resolve_base(name) == root
  (root / lost).unlink()
  with pytest.raises(UserError, match=f"{root} lacks {lost} of model_index") as error:
    resolve_base(name)
  assert f"`hf download some/base --revision {COMMIT} --include" in str(error.value)
