"""Scorers: networks against PyTorch, preprocessing against the references', scores, bad folders."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch
import torch.nn.functional as F
import transformers
from flax import nnx
from jax.sharding import Mesh
from PIL import Image
from torch_parity import abstract, randomise, relative_error
from transformers.image_transforms import convert_to_rgb
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cc_jax.bases.tokenizer import train_tokenizer
from cc_jax.bases.torch_names import torch_shapes
from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError
from cc_jax.metrics.dino_scorer import DinoV1Scorer, DinoV2Scorer, DinoV3Scorer
from cc_jax.metrics.frechet import frechet_distance
from cc_jax.metrics.masked import cut_out
from cc_jax.metrics.preprocessing import CLIP_STATISTICS, Preprocessing
from cc_jax.metrics.scorers import cosine, load_scorer
from cc_jax.models.dino import Dino
from cc_jax.models.dinov3 import Dinov3, Dinov3Config

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red teapot", "a photo of a red teapot on the beach", "the beach"]
# An epsilon as large as this shows in the numbers when another one is taken.
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, layer_norm_eps=0.1)
VIT = dict(**SMALL, intermediate_size=24, image_size=28, patch_size=14)
DINOV3 = dict(**SMALL, intermediate_size=24, patch_size=56, num_register_tokens=3)


def pictures(count: int = 3) -> list[np.ndarray]:
  return [np.random.default_rng(i).integers(0, 256, (40 + 9 * i, 50 - 8 * i, 3), dtype=np.uint8)
          for i in range(count)]  # fmt: skip


def nchw(pixels: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())


# ---- folders as their authors publish them, with small random networks


def make_clip(folder):
  tokenizer = train_tokenizer(PROMPTS, folder, 530, max_length=14)
  ids = dict(vocab_size=len(tokenizer), bos_token_id=len(tokenizer) - 2,
             eos_token_id=len(tokenizer) - 1)  # fmt: skip
  text = dict(**SMALL | dict(hidden_size=12), **ids, intermediate_size=20,
              max_position_embeddings=14)  # fmt: skip
  vision = dict(**SMALL, intermediate_size=24, image_size=32, patch_size=16)
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
  return transformers.CLIPModel(config)


def make_dino(folder):
  return transformers.ViTModel(transformers.ViTConfig(**VIT))


def make_dinov2(folder):
  values = dict(size=dict(shortest_edge=32), crop_size=dict(height=28, width=28))
  (folder / "preprocessor_config.json").write_text(json.dumps(values))
  return transformers.Dinov2Model(transformers.Dinov2Config(**VIT, mlp_ratio=2))


def make_dinov3(folder):
  return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**DINOV3))


HUGGING_FACE = {"clip": make_clip, "dino": make_dino, "dinov2": make_dinov2, "dinov3": make_dinov3}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """kind -> (folder, PyTorch's model), made once when it is asked for."""
  made = {}

  def make(kind):
    if kind not in made:
      folder = tmp_path_factory.mktemp(kind)
      model = randomise(HUGGING_FACE[kind](folder))
      model.save_pretrained(folder)
      made[kind] = folder, model
    return made[kind]

  return make


# ---- networks


def test_clip_is_transformers(published):
  """Image and text, unit length and as they are; three rows in batches of two."""
  folder, theirs = published("clip")
  scorer = load_scorer("clip", folder, batch_size=2)
  with torch.no_grad():
    image = theirs.get_image_features(nchw(scorer.prepare(pictures()))).pooler_output
    ids = torch.from_numpy(scorer.token_ids(PROMPTS)).long()
    text = theirs.get_text_features(ids).pooler_output
  raw = scorer.image_features(pictures(), raw=True)
  assert raw.dtype == np.float32 and relative_error(raw, image) < 1e-5
  image, text = F.normalize(image), F.normalize(text)
  assert relative_error(scorer.image_features(pictures()), image) < 1e-5
  assert relative_error(scorer.text_features(PROMPTS), text) < 1e-5
  assert np.allclose(cosine(raw, text), image @ text.T, atol=1e-5)


@pytest.mark.parametrize("kind", ["dino", "dinov2", "dinov3"])
def test_dino_is_transformers(kind, published):
  folder, theirs = published(kind)
  scorer = load_scorer(kind, folder, batch_size=2)
  with torch.no_grad():
    wanted = theirs(nchw(scorer.prepare(pictures()))).last_hidden_state[:, 0]
  assert relative_error(scorer.image_features(pictures(), raw=True), wanted) < 1e-5
  assert relative_error(scorer.image_features(pictures()), F.normalize(wanted)) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_on_a_picture_that_is_not_square(gated):
  """Rotations of y and of x are told apart; every token and hidden state."""
  values = dict(**DINOV3 | dict(patch_size=4), use_gated_mlp=gated, key_bias=gated, rope_theta=7.0)
  theirs = randomise(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**values)))
  ours = _loaded(Dinov3, Dinov3Config.from_dict(theirs.config.to_dict()), theirs.state_dict())
  pixels = np.random.default_rng(0).standard_normal((1, 9, 22, 3)).astype(np.float32)
  with torch.no_grad():
    wanted = theirs(nchw(pixels), output_hidden_states=True)
  last, embedding, states = jax.jit(lambda x: ours(x))(pixels)
  assert relative_error(last, wanted.last_hidden_state) < 1e-5
  assert relative_error(embedding, wanted.pooler_output) < 1e-5
  for state, other in zip(states, wanted.hidden_states, strict=True):
    assert relative_error(state, other) < 1e-5


def _loaded(cls, config, tensors):
  """Our network with PyTorch's tensors; each is used."""
  named = {cls.hub_name(name): tensor.numpy() for name, tensor in tensors.items()}
  named.pop(None, None)
  return load_weights(abstract(cls, config), named)


class TorchImageReward(torch.nn.Module):
  """ImageReward.py of THUDM/ImageReward on transformers' BLIP, with the names of its file."""

  # transformers' names -> timm's, which ImageReward's file has.
  RENAMED = (
    ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."), ("encoder.layers.", "blocks."),
    (".self_attn.projection.", ".attn.proj."), (".self_attn.qkv.", ".attn.qkv."),
    ("layer_norm", "norm"), ("post_layernorm.", "norm."),
  )  # fmt: skip

  def __init__(self, vision, text):
    super().__init__()
    self.visual_encoder = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision))
    self.text_encoder = transformers.models.blip.modeling_blip_text.BlipTextModel(
      transformers.BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"]),
      add_pooling_layer=False,
    )
    linear, dropout, width = torch.nn.Linear, torch.nn.Dropout(), text["hidden_size"]
    self.layers = torch.nn.Sequential(
      linear(width, 1024), dropout, linear(1024, 128), dropout, linear(128, 64), dropout,
      linear(64, 16), linear(16, 1),
    )  # fmt: skip

  def forward(self, pixels, ids, mask):
    image = self.visual_encoder(pixels).last_hidden_state
    text = self.text_encoder(
      input_ids=ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False,
      encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
    ).last_hidden_state
    return (self.layers(text[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072

  def published(self) -> dict[str, torch.Tensor]:
    """The state_dict as it is on the hub, with what no score reads."""
    tensors = {}
    for name, tensor in self.visual_encoder.state_dict().items():
      for theirs, timm in self.RENAMED:
        name = name.replace(theirs, timm)
      tensors[f"blip.visual_encoder.{name}"] = tensor
    text = self.text_encoder.state_dict()
    tensors |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.items()}
    tensors |= {f"mlp.layers.{n}": tensor for n, tensor in self.layers.state_dict().items()}
    positions = torch.arange(self.text_encoder.config.max_position_embeddings)[None]
    return tensors | {
      "blip.text_encoder.embeddings.position_ids": positions,
      "blip.vision_proj.weight": torch.zeros(256, 128), "blip.vision_proj.bias": torch.zeros(256),
      "blip.text_proj.weight": torch.zeros(256, 24), "blip.text_proj.bias": torch.zeros(256),
    }  # fmt: skip


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
  folder = tmp_path_factory.mktemp("imagereward")
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a red tea ##pot photo of on the".split()]
  text = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
              max_position_embeddings=40, vocab_size=len(words) + 2, hidden_act="gelu",
              layer_norm_eps=0.1)  # fmt: skip
  vision = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
                image_size=32, patch_size=16, layer_norm_eps=1e-6)  # fmt: skip
  theirs = randomise(TorchImageReward(vision, text))
  with torch.no_grad():  # tokens so small that the first norm's epsilon counts
    for name, tensor in theirs.visual_encoder.embeddings.named_parameters():
      tensor.mul_(1e-3 if "patch" not in name else 1e-4)
  (folder / "vocab.txt").write_text("\n".join(words) + "\n")
  (folder / "med_config.json").write_text(json.dumps(text | dict(model_type="bert")))
  tensors = {name: tensor.clone().contiguous() for name, tensor in theirs.published().items()}
  safetensors.torch.save_file(tensors, folder / "model.safetensors")
  return folder, theirs


def test_image_reward_is_its_repository(image_reward):
  folder, theirs = image_reward
  scorer = load_scorer("imagereward", folder, batch_size=2)
  prompts = ["a Red teapot", "photo of the teapot on a red tea", "the giraffe"]
  ids, mask = scorer.token_ids(prompts)
  assert ids.shape == (3, 35) and list(ids[0, :6]) == [2, 5, 6, 7, 8, 3] and mask[0].sum() == 6
  pixels = nchw(scorer.prepare(pictures()))
  with torch.no_grad():
    wanted = theirs(pixels, torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
    image = theirs.visual_encoder(pixels).last_hidden_state[:, 0]
  assert relative_error(scorer.reward(prompts, pictures()), wanted) < 1e-5
  assert relative_error(scorer.image_features(pictures()), image) < 1e-5
  assert np.std(wanted.numpy()) > 1e-3  # the rewards differ


class TorchLpips(torch.nn.Module):
  """lpips.py and pretrained_networks.py of PerceptualSimilarity, with their names."""

  CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}

  def __init__(self, net):
    super().__init__()
    conv, relu = torch.nn.Conv2d, torch.nn.ReLU()
    if net == "alex":
      pool = torch.nn.MaxPool2d(3, 2)
      features = [conv(3, 64, 11, 4, 2), relu, pool, conv(64, 192, 5, padding=2), relu, pool,
                  conv(192, 384, 3, padding=1), relu, conv(384, 256, 3, padding=1), relu,
                  conv(256, 256, 3, padding=1), relu]  # fmt: skip
      ends = (0, 2, 5, 8, 10, 12)
    else:
      features, inputs = [], 3
      for width, count in zip(self.CHANNELS[net], (2, 2, 3, 3, 3)):
        for _ in range(count):
          features += [conv(inputs, width, 3, padding=1), relu]
          inputs = width
        features.append(torch.nn.MaxPool2d(2, 2))
      ends = (0, 4, 9, 16, 23, 30)
    self.slices = torch.nn.ModuleDict()
    for index, (start, end) in enumerate(zip(ends, ends[1:]), start=1):
      part = torch.nn.Sequential()
      for place in range(start, end):
        part.add_module(str(place), features[place])
      self.slices[f"slice{index}"] = part
    self.lins = torch.nn.ModuleList(
      torch.nn.Sequential(torch.nn.Dropout(), conv(width, 1, 1, bias=False))
      for width in self.CHANNELS[net]
    )

  def forward(self, a, b):
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    a, b, total = (a - shift) / scale, (b - shift) / scale, 0
    for part, lin in zip(self.slices.values(), self.lins):
      a, b = part(a), part(b)
      unit = (x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + 1e-10) for x in (a, b))
      total = total + lin((next(unit) - next(unit)) ** 2).mean([2, 3])
    return total[:, 0]

  def published(self):
    tensors = {f"net.{name}": tensor for name, tensor in self.slices.state_dict().items()}
    for index, lin in enumerate(self.lins):
      for name in (f"lin{index}", f"lins.{index}"):
        tensors[f"{name}.model.1.weight"] = lin[1].weight
    shift = torch.zeros(1, 3, 1, 1)
    return tensors | {"scaling_layer.shift": shift, "scaling_layer.scale": shift}


def save_lpips(folder, net):
  theirs = TorchLpips(net).eval()
  with torch.no_grad():
    for lin in theirs.lins:
      lin[1].weight.abs_()
  tensors = {name: tensor.detach().clone() for name, tensor in theirs.published().items()}
  safetensors.torch.save_file(tensors, folder / "model.safetensors")
  values = dict(architectures=["LPIPS"], net=net)
  (folder / "config.json").write_text(json.dumps(values))
  return theirs


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_is_its_repository(net, tmp_path):
  """Pairs of two sizes; equal pictures have no distance at all. (VGG takes long: one pair.)"""
  torch.manual_seed(0)
  theirs = save_lpips(tmp_path, net)
  rng = np.random.default_rng(0)
  sizes = ((35, 47, 3), (40, 33), (35, 47, 3)) if net == "alex" else ((16, 19, 3),)
  a, b = ([rng.integers(0, 256, size, dtype=np.uint8) for size in sizes] for _ in range(2))
  b = [*b[:2], *a[2:]]
  scorer = load_scorer("lpips", tmp_path, batch_size=2 if net == "alex" else 1)
  scores = scorer.pair_scores(a, b)
  for index in range(len(a)):
    x, y = (np.asarray(Image.fromarray(p[index]).convert("RGB"), np.float32) for p in (a, b))
    with torch.no_grad():
      wanted = theirs(*(nchw(2 * (z[None] / 255) - 1) for z in (x, y)))
    assert abs(scores[index] - float(wanted[0])) < 1e-5 * scores.max()
  assert min(scores[:2]) > 0 and not scores[2:].any()


# ---- preprocessing


def odd_pictures() -> list[Image.Image]:
  """Tall, wide, tiny, grey, with a palette, with alpha, of two levels; sizes of odd margins."""
  rng = np.random.default_rng(0)

  def picture(width, height, channels=3):
    noise = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(noise[..., 0] if channels == 1 else noise)

  sizes = [(30, 200), (200, 30), (1, 1), (2, 3), (224, 224), (225, 227), (150, 101), (101, 150),
           (256, 256), (300, 299), (223, 260), (64, 63), (5, 90)]  # fmt: skip
  found = [picture(*size) for size in sizes]
  found += [picture(90, 61, 1), picture(61, 90, 4), picture(40, 40, 4)]
  found += [picture(77, 50).quantize(16), picture(80, 51, 4).convert("LA")]
  found += [picture(33, 44).convert("1"), picture(99, 70).convert("CMYK")]
  return found


def as_processor(processor):
  """transformers' own, in our layout and still to be normalised."""

  def run(image):
    return np.moveaxis(np.asarray(processor([image])["pixel_values"][0]), 0, -1)

  return run


def as_torchvision(edge, size, mean, std, *, rgb_last):
  """Resize(edge, bicubic), CenterCrop(size), ToTensor, Normalize: transforms/functional.py."""

  def run(image):
    image = image if rgb_last else image.convert("RGB")
    (width, height), short = image.size, min(image.size)
    if short != edge:
      wide = (int(edge * width / height), edge) if height <= width else None
      image = image.resize(wide or (edge, int(edge * height / width)), Image.BICUBIC)
    top, left = (int(round((side - size) / 2.0)) for side in image.size[::-1])
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    return (np.asarray(image, np.float64) / 255 - mean) / std

  return run


def as_dinov3(image):
  """DINOv3ViTImageProcessor: rescale, resize by torch's antialiased interpolation, normalise."""
  pixels = torch.from_numpy(convert_to_rgb(image, return_numpy=True).astype(np.float32) / 255)
  pixels = pixels.permute(2, 0, 1)[None]
  resized = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
  mean, std = Dino.normalisation.values()
  return (resized[0].permute(1, 2, 0).numpy() - mean) / std


class Size:
  image_size = 224


PREPROCESSING = {
  "clip": (
    Preprocessing(224, 224, **CLIP_STATISTICS),
    as_processor(CLIPImageProcessorPil()),
  ),
  "dino": (
    DinoV1Scorer.preprocessing_of(Size, {}),
    as_torchvision(256, 224, *Dino.normalisation.values(), rgb_last=False),
  ),
  "dinov2": (
    DinoV2Scorer.preprocessing_of(Size, {}),
    as_processor(BitImageProcessorPil(
      size=dict(shortest_edge=256), image_mean=Dino.normalisation["mean"],
      image_std=Dino.normalisation["std"])),
  ),
  "dinov3": (DinoV3Scorer.preprocessing_of(Size, {}), as_dinov3),
  "imagereward": (
    Preprocessing(224, 224, **CLIP_STATISTICS, crop="round", alpha="drop_last"),
    as_torchvision(224, 224, *CLIP_STATISTICS.values(), rgb_last=True),
  ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PREPROCESSING)
def test_preprocessing_is_the_references(kind):
  """To a thousandth of a level; one level was asked for."""
  ours, theirs = PREPROCESSING[kind]
  images = odd_pictures()
  assert len(images) == 20
  for image, pixels in zip(images, ours(images), strict=True):
    levels = np.abs(pixels - theirs(image)) * np.asarray(ours.std) * 255
    assert levels.max() < 1e-2, (image, levels.max())


def test_arrays_are_prepared_as_pictures():
  ours = Preprocessing(20, 20, **CLIP_STATISTICS)
  grey = np.random.default_rng(0).integers(0, 256, (30, 41), dtype=np.uint8)
  alpha = np.random.default_rng(1).integers(0, 256, (30, 41, 4), dtype=np.uint8)
  grey3 = np.repeat(grey[..., None], 3, axis=-1)
  assert np.array_equal(ours([grey]), ours([grey3])) and np.array_equal(
    ours([grey[..., None]]), ours([Image.fromarray(grey)]))  # fmt: skip
  drop = Preprocessing(20, 20, **CLIP_STATISTICS, alpha="drop")
  assert np.array_equal(drop([alpha]), ours([alpha[..., :3]]))
  for wrong in (grey.astype(np.float32), grey3[None], np.zeros((4, 4, 2), np.uint8)):
    with pytest.raises(UserError, match="picture 1 is .*uint8"):
      ours([grey, wrong])
  with pytest.raises(UserError, match="picture 0 has no pixels"):
    ours([np.zeros((0, 4, 3), np.uint8)])


def test_what_changes_a_score_is_in_its_name(published, image_reward):
  """Two scores that were computed otherwise have other lines."""
  folder, _ = published("clip")
  line = load_scorer("clip", folder).describe()
  assert re.search(r"CLIP ViT-16x2/16 .*cosine times 1; text prefix ''; alpha laid on white; "
                   r"shorter side resized to 32 \(Pillow bicubic\), centre crop 32 \(margin round",
                   line)  # fmt: skip
  assert re.search("whole picture; sha256 [0-9a-f]{64}$", line) and "\n" not in line
  scorer = load_scorer("clip", folder, text_prefix="a photo of ")
  assert "text prefix 'a photo of '" in scorer.describe()
  assert "subject alone on grey (128)" in scorer.describe(masked="grey")
  plain = load_scorer("clip", folder).token_ids(["a photo of a red teapot"])
  assert np.array_equal(scorer.token_ids(["a red teapot"]), plain)
  assert "rounded half to even" in load_scorer("imagereward", image_reward[0]).describe()
  assert "(Pillow bilinear on floats)" in load_scorer("dinov3", published("dinov3")[0]).describe()


# ---- scores


def test_masked_scores_see_the_subject_alone(published):
  picture, mask = pictures(1)[0], np.zeros((40, 50), np.uint8)
  mask[10:30, 5:20], mask[10, 5] = 255, 51
  (white,) = cut_out([picture], [mask])
  assert np.array_equal(white[11:30, 6:20], picture[11:30, 6:20])
  assert (white[mask == 0] == 255).all()
  assert np.array_equal(white[10, 5], np.rint(0.2 * picture[10, 5] + 0.8 * 255))
  (grey,) = cut_out([picture], [mask], "grey")
  assert (grey[mask == 0] == 128).all()
  scorer = load_scorer("dino", published("dino")[0], batch_size=1)
  masked = scorer.image_features([picture], masks=[mask], background="grey")
  assert np.array_equal(masked, scorer.image_features([grey]))
  other = np.where(mask[..., None] == 0, 255 - picture, picture)  # another background
  assert np.array_equal(masked, scorer.image_features([other], masks=[mask], background="grey"))
  for wrong, named in [
    (dict(masks=[mask[1:]]), "mask 0 .*needs uint8"), (dict(masks=[]), "1 pictures, but 0 masks"),
    (dict(masks=[0 * mask]), "mask 0 has no subject"),
    (dict(masks=[mask], background="blue"), "background is 'blue'"),
  ]:  # fmt: skip
    with pytest.raises(UserError, match=named):
      scorer.image_features([picture], **wrong)


def test_frechet_is_the_formula():
  """With full rank, with fewer pictures than channels, and on numbers that have a closed form."""
  rng = np.random.default_rng(0)
  a = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6)) + 1
  b = rng.standard_normal((25, 6))
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  gap = a.mean(0) - b.mean(0)
  wanted = gap @ gap + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  assert abs(frechet_distance(a, b) - wanted) < 1e-9 * wanted
  assert frechet_distance(a, a[::-1]) < 1e-9 and frechet_distance(a, a + 3) == pytest.approx(54)

  a, b = rng.standard_normal((5, 9)), rng.standard_normal((7, 9))
  values = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real
  gap = a.mean(0) - b.mean(0)
  traces = np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(np.maximum(values, 0)).sum()
  assert frechet_distance(a, b) == pytest.approx(gap @ gap + traces, rel=1e-6)

  line = np.array([[0.0], [2.0]])  # mean 1, variance 2
  assert frechet_distance(line, 3 * line + 5) == pytest.approx((8 - 1) ** 2 + 2 * (3 - 1) ** 2)
  with pytest.raises(ValueError, match="two or more rows"):
    frechet_distance(line[:1], line)


def test_a_mesh_that_does_not_divide_the_batch(published):
  mesh = Mesh(np.array(jax.devices()[:1] * 3).reshape(3), ("data",))
  with pytest.raises(UserError, match="batch_size 8 .*use a multiple of 3"):
    load_scorer("dino", published("dino")[0], batch_size=8, mesh=mesh)


EIGHT_DEVICES = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
from cc_jax.metrics.scorers import load_scorer

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
scorer = load_scorer("dino", sys.argv[1], batch_size=8, mesh=mesh)
pictures = np.load(sys.argv[2])
np.save(sys.argv[2], scorer.image_features(list(pictures)))
"""


@pytest.mark.slow
def test_eight_devices_give_the_same_scores(published, tmp_path):
  folder, file = published("dino")[0], tmp_path / "pictures.npy"
  images = np.random.default_rng(0).integers(0, 256, (11, 30, 30, 3), dtype=np.uint8)
  np.save(file, images)
  command = [sys.executable, "-c", EIGHT_DEVICES, str(folder), str(file)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  one = load_scorer("dino", folder, batch_size=4).image_features(list(images))
  assert np.abs(np.load(file) - one).max() < 1e-5 and one.std() > 0.01


# ---- folders and inputs that are wrong


def test_folders_of_other_models_are_named(published, image_reward, tmp_path):
  clip, dino = published("clip")[0], published("dino")[0]
  for kind, folder, named in [
    ("clip", dino, r"holds ViTModel; the scorer 'clip' reads CLIPModel, such as openai/clip-vit"),
    ("dino", published("dinov2")[0], "holds Dinov2Model; the scorer 'dino' reads ViTModel"),
    ("dinov3", clip, "holds CLIPModel; the scorer 'dinov3' reads DINOv3ViTModel"),
    ("imagereward", clip, "holds CLIPModel; the scorer 'imagereward' reads.*med_config.json"),
    ("lpips", image_reward[0], "config.json is missing"),
    ("dino", tmp_path / "nowhere", "is no folder"),
    ("dino", "owner/dino-vits16", "owner/dino-vits16.*nor in the hub's cache"),
    ("fid", clip, "scorer 'fid' is unknown; we have clip, dino,"),
  ]:
    with pytest.raises(UserError, match=named) as error:
      load_scorer(kind, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, victim", [
  ("clip", "visual_projection.weight"), ("dinov3", "layer.1.layer_scale2.lambda1"),
  ("imagereward", "mlp.layers.7.bias"),
])  # fmt: skip
def test_every_key_is_used_and_none_is_missing(kind, victim, published, image_reward, tmp_path):
  folder = image_reward[0] if kind == "imagereward" else published(kind)[0]
  for file in folder.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  weights = tmp_path / "model.safetensors"
  tensors = safetensors.torch.load_file(weights)
  changed = tensors | {"something.else": torch.zeros(2)}
  assert changed.pop(next(name for name in tensors if name.endswith(victim))) is not None
  safetensors.torch.save_file(changed, weights, metadata={"format": "pt"})
  with pytest.raises(UserError) as error:
    load_scorer(kind, tmp_path)
  message = str(error.value)
  assert str(tmp_path) in message and victim.split(".", 2)[-1] in message
  assert "something.else" in message and "missing" in message


def test_prompts_and_counts_that_do_not_fit(published, image_reward):
  clip = load_scorer("clip", published("clip")[0])
  long = "a red teapot " * 5
  with pytest.raises(UserError, match=r"a red teapot .* has 17 tokens; .* reads 14: shorten it"):
    clip.check_prompts(["a red teapot", long])
  reward = load_scorer("imagereward", image_reward[0])
  with pytest.raises(UserError, match=r"has 37 tokens; ImageReward reads 35"):
    reward.reward(["red " * 35], pictures(1))
  with pytest.raises(UserError, match="2 prompts and 1 pictures"):
    reward.reward(["red", "tea"], pictures(1))
  with pytest.raises(UserError, match="the scorer 'clip' has no reward; .* imagereward"):
    clip.reward(["red"], pictures(1))
  with pytest.raises(UserError, match="picture 40 is float32"):  # not the 8th of the second batch
    clip.image_features([*pictures(1) * 40, np.zeros((4, 4), np.float32)])
  with pytest.raises(UserError, match="no pictures"):
    clip.image_features([])
  with pytest.raises(UserError, match="takes no text_prefix"):
    load_scorer("dino", published("dino")[0], text_prefix="a photo of ")


def test_lpips_pairs_that_do_not_fit(tmp_path):
  save_lpips(tmp_path, "alex")
  scorer = load_scorer("lpips", tmp_path)
  small, large = np.zeros((30, 40, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)
  with pytest.raises(UserError, match="pair 1: pictures of 40 x 40 and 40 x 30 pixels"):
    scorer.pair_scores([large, large], [large, small])
  with pytest.raises(UserError, match="pair 0: 40 x 30 pixels; LPIPS needs 31"):
    scorer.pair_scores([small], [small])
  with pytest.raises(UserError, match="has no image_features"):
    scorer.image_features([large])


def test_image_reward_as_it_is_published(image_reward, tmp_path):
  """The hub has a pickle, and no vocabulary: the error says what to do."""
  (tmp_path / "med_config.json").write_text("{}")
  (tmp_path / "ImageReward.pt").write_bytes(b"")
  with pytest.raises(UserError, match=r"ImageReward.pt is a pickle.*save_file"):
    load_scorer("imagereward", tmp_path)
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match=r"vocab.txt is missing.*bert-base-uncased"):
    load_scorer("imagereward", tmp_path)


def test_dinov3_published_sizes():
  """Names and shapes of the largest of each kind: ViT-S/16 and the gated ViT-H+/16."""
  for values in (
    dict(num_register_tokens=4),
    dict(hidden_size=1280, num_attention_heads=20, intermediate_size=5120, use_gated_mlp=True,
         num_register_tokens=4),
  ):  # fmt: skip
    config = transformers.DINOv3ViTConfig(**values, num_hidden_layers=1)
    with torch.device("meta"):
      theirs = transformers.DINOv3ViTModel(config)
    ours = torch_shapes(nnx.state(abstract(Dinov3, Dinov3Config.from_dict(config.to_dict()))))
    wanted = {Dinov3.hub_name(n): tuple(p.shape) for n, p in theirs.named_parameters()}
    wanted.pop(None)
    assert ours == wanted
