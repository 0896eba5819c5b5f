"""CLIP's towers against transformers, and the tokenizer."""

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx
from torch_parity import abstract, assert_same, assert_same_names, randomise, relative_error

from cc_jax.bases.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel

# An epsilon as large as this shows in the numbers when another one is taken.
SMALL = dict(
  hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
  projection_dim=24, layer_norm_eps=0.1,
)  # fmt: skip
TEXT = dict(**SMALL, vocab_size=60, max_position_embeddings=12, bos_token_id=50)
IDS = np.array([[50, 3, 4, 51, 51, 51, 51], [50, 7, 59, 9, 8, 51, 51], [50, 8, 51, 51, 51, 51, 51]])
TOWERS = {  # config, projection, where the sentences are read off
  # Configs from before eos_token_id was right: the highest id is taken for EOS, here a 59.
  "vit_l": (dict(hidden_act="quick_gelu", eos_token_id=2), False, [3, 2, 2]),
  "h": (dict(hidden_act="gelu", eos_token_id=51), False, [3, 5, 2]),
  "bigg": (dict(hidden_act="gelu", eos_token_id=51), True, [3, 5, 2]),
}


@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize("tower", TOWERS)
def test_text_parity(tower, batch, tmp_path):
  extra, projection, pooled_at = TOWERS[tower]
  ids = IDS[:batch]
  cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
  theirs = randomise(cls(transformers.CLIPTextConfig(**TEXT, **extra)))
  theirs.save_pretrained(tmp_path)
  config = CLIPTextConfig.from_dict(theirs.config.to_dict())
  assert config.with_projection == projection
  ours = load_weights(abstract(CLIPTextModel, config), tmp_path)
  assert list(ours.pool_position(ids)) == pooled_at[:batch]

  def run_theirs():
    out = theirs(torch.from_numpy(ids), output_hidden_states=True)
    pooled = out.text_embeds if projection else out.pooler_output
    return [out.last_hidden_state, pooled, *out.hidden_states]

  def run_ours(module):
    last, pooled, states = module(ids)
    return [last, pooled, *states]

  assert_same(run_ours, ours, [], run_theirs, theirs)


def test_text_from_embeddings():
  """inputs_embeds enter before the positions; the ids to pool by are given."""
  model = CLIPTextModel(CLIPTextConfig(**TEXT, eos_token_id=51), rngs=nnx.Rngs(0))
  wanted, other = (
    jax.jit(lambda ids, pool: model(ids, pool_ids=pool))(IDS, pool) for pool in (IDS, IDS[::-1])
  )
  embeds = model.token_embedding(IDS)
  got = jax.jit(lambda embeds: model(inputs_embeds=embeds, pool_ids=IDS))(embeds)
  assert relative_error(got.pooled, wanted.pooled) < 1e-6
  assert relative_error(got.last_hidden_state, wanted.last_hidden_state) < 1e-6
  assert relative_error(other.pooled, wanted.pooled) > 1e-2
  assert np.array_equal(other.pooled[0], other.last_hidden_state[0, 2])
  with pytest.raises(ValueError, match="pool_ids"):
    model(inputs_embeds=embeds)
  with pytest.raises(ValueError, match="positions"):
    model(np.zeros((1, 13), int))


def test_context_is_what_diffusers_pipelines_make_of_a_prompt(tmp_path):
  """Clip-skip and SDXL's penultimate layer."""
  tokenizer = train_tokenizer(["a red teapot"], tmp_path / "tokenizer", 520, max_length=9)
  settings = SMALL | dict(
    vocab_size=520, num_hidden_layers=4, max_position_embeddings=9, hidden_act="gelu",
    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
  )  # fmt: skip
  # diffusers 0.42 looks for `text_model`, which transformers 5 has under a projection only.
  cls = transformers.CLIPTextModelWithProjection
  theirs = randomise(cls(transformers.CLIPTextConfig(**settings)))
  theirs.save_pretrained(tmp_path)
  ours = load_weights(
    abstract(CLIPTextModel, CLIPTextConfig.from_dict(theirs.config.to_dict())), tmp_path
  )
  parts = dict(text_encoder=theirs, tokenizer=tokenizer, vae=None, unet=None, scheduler=None)
  sd = diffusers.StableDiffusionPipeline(
    **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
  )
  sdxl = diffusers.StableDiffusionXLPipeline(
    **parts, text_encoder_2=theirs, tokenizer_2=tokenizer, add_watermarker=False
  )
  prompt = "a red teapot"
  arguments = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
  ids = tokenizer(prompt, padding="max_length", return_tensors="np")["input_ids"]
  with jax.default_matmul_precision("highest"):
    out = jax.jit(lambda ids: ours(ids))(ids)

  assert relative_error(ours.context(out), out.last_hidden_state) < 1e-6
  for skip in (1, 2):
    wanted = sd.encode_prompt(prompt, **arguments, clip_skip=skip)[0].detach()
    assert relative_error(ours.context(out, clip_skip=skip), wanted) < 1e-5
  for skip in (0, 2):
    wanted = sdxl.encode_prompt(prompt, **arguments, clip_skip=skip or None)[0].detach()
    context = ours.context(out, penultimate=True, clip_skip=skip)
    assert relative_error(np.concatenate([context] * 2, axis=-1), wanted) < 1e-5
  with pytest.raises(UserError, match="clip_skip is 4 and .* has 4 layers; use 0 to 3"):
    ours.context(out, penultimate=True, clip_skip=4)


@pytest.mark.parametrize(
  "extra, projection, batch",
  [
    (dict(image_size=16, patch_size=8, hidden_act="quick_gelu"), True, 3),
    (dict(image_size=22, patch_size=7, hidden_act="gelu"), False, 1),  # a pixel is left over
    # bigG: heads whose width is no power of two, an MLP that is no multiple.
    (
      dict(
        image_size=28, patch_size=14, hidden_act="gelu", hidden_size=26, num_attention_heads=2,
        intermediate_size=49,
      ),
      True,
      1,
    ),
  ],
  ids=["vit_l", "plain", "bigg"],
)  # fmt: skip
def test_vision_parity(extra, projection, batch, tmp_path):
  cls = transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
  theirs = randomise(cls(transformers.CLIPVisionConfig(**SMALL | extra)))
  theirs.save_pretrained(tmp_path)
  config = CLIPVisionConfig.from_dict(theirs.config.to_dict())
  assert config.with_projection == projection
  ours = load_weights(abstract(CLIPVisionModel, config), tmp_path)
  size = extra["image_size"]
  pixels = np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)

  def run_theirs(pixels):
    out = theirs(pixels.permute(0, 3, 1, 2), output_hidden_states=True)
    if projection:
      return [out.last_hidden_state, out.image_embeds, *out.hidden_states]
    return [out.last_hidden_state, out.pooler_output, *out.hidden_states]

  def run_ours(module, pixels):
    last, states, pooled, embeds = module(pixels)
    assert (embeds is not None) == projection
    return [last, embeds if projection else pooled, *states]

  assert_same(run_ours, ours, [pixels], run_theirs, theirs)
  with pytest.raises(ValueError, match="takes"):
    ours(pixels[:, :-1])


def _text(width, layers, heads, act):
  return dict(
    hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
    num_attention_heads=heads, hidden_act=act, projection_dim=width,
  )  # fmt: skip


@pytest.mark.parametrize(
  "settings, projection",
  [
    (_text(768, 12, 12, "quick_gelu"), False),  # ViT-L: SD 1.x, SDXL's first
    (_text(1024, 23, 16, "gelu"), False),  # OpenCLIP-H: SD 2.x
    (_text(1280, 32, 20, "gelu"), True),  # OpenCLIP-bigG: SDXL's second
  ],
  ids=["vit_l", "h", "bigg"],
)
def test_text_real_sizes(settings, projection):
  cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
  names = {"architectures": [cls.__name__]}
  assert_same_names(
    CLIPTextModel,
    CLIPTextConfig.from_dict(settings | names),
    lambda: cls(transformers.CLIPTextConfig(**settings)),
  )


@pytest.mark.parametrize(
  "width, hidden, layers, heads, out",
  [(1024, 4096, 24, 16, 768), (1280, 5120, 32, 16, 1024), (1664, 8192, 48, 16, 1280)],
  ids=["vit_l_14", "vit_h_14", "vit_bigg_14"],
)
def test_vision_real_sizes(width, hidden, layers, heads, out):
  settings = dict(
    hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
    num_attention_heads=heads, projection_dim=out, patch_size=14,
  )  # fmt: skip
  assert_same_names(
    CLIPVisionModel,
    CLIPVisionConfig.from_dict(settings | {"architectures": ["CLIPVisionModelWithProjection"]}),
    lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**settings)),
  )


@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["transformers_5", "classic"])
def test_text_key_layouts(prefix, tmp_path):
  """Both layouts load alike, with the buffer of positions that old files hold."""
  config = CLIPTextConfig(**TEXT)
  theirs = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)))
  state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
  state[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
  safetensors.torch.save_file(state, tmp_path / "model.safetensors")
  ours = load_weights(abstract(CLIPTextModel, config), tmp_path)
  wanted = theirs.embeddings.token_embedding.weight.detach().numpy()
  assert np.array_equal(ours.token_embedding.embedding[...], wanted)


@pytest.mark.parametrize(
  "key, value",
  [
    ("hidden_act", "mish"),
    ("num_attention_heads", 5),
    ("hidden_size", "32"),
    ("eos_token_id", [1, 2]),
    ("architectures", ["CLIPModel"]),
  ],
)
def test_unknown_config_value(key, value):
  with pytest.raises(UserError, match=key):
    CLIPTextConfig.from_dict(TEXT | {key: value})


def test_tokenizer(tmp_path):
  texts = ["A red teapot on the beach", "a red teddy bear on a red beach", "a photo of a teapot"]
  tokenizer = train_tokenizer(texts, tmp_path / "a", vocab_size=600, max_length=16)
  assert tokenizer.bos_token_id == len(tokenizer) - 2
  assert tokenizer.eos_token_id == len(tokenizer) - 1
  assert tokenizer.pad_token_id == tokenizer.eos_token_id
  assert tokenizer.model_max_length == 16

  ids = tokenizer("A red  TEAPOT on\nthe beach", padding="max_length")["input_ids"]
  words = ["<|startoftext|>", "a</w>", "red</w>", "teapot</w>", "on</w>", "the</w>", "beach</w>"]
  assert tokenizer.convert_ids_to_tokens(ids) == words + ["<|endoftext|>"] * 9
  # Nothing is unknown: EOS, the unknown token, stands once, at the end.
  for text in ("zebra, naïve!", "熊" * 2):
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")

  # By hand: "ea" is there five times (teapot, bear, beach), "ed", "bea" and "red" three times.
  merges = (tmp_path / "a" / "merges.txt").read_text().splitlines()
  assert merges[:5] == ["#version: 0.2", "e a", "b ea", "e d</w>", "r ed</w>"]
  again = train_tokenizer(texts, tmp_path / "b", vocab_size=600, max_length=16)
  save_tokenizer(again, tmp_path / "c")
  for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
    wanted = (tmp_path / "a" / name).read_bytes()
    assert (tmp_path / "b" / name).read_bytes() == wanted == (tmp_path / "c" / name).read_bytes()
  assert len(train_tokenizer(texts, tmp_path / "d", vocab_size=516, max_length=16)) == 516


def test_tokenizer_errors(tmp_path):
  with pytest.raises(UserError, match="514"):
    train_tokenizer(["a"], tmp_path, vocab_size=500, max_length=16)
  with pytest.raises(UserError, match="vocab.json is missing"):
    load_tokenizer(tmp_path / "nowhere")
  train_tokenizer(["a b"], tmp_path / "a", vocab_size=514, max_length=16)
  (tmp_path / "a" / "vocab.json").write_text("{")
  with pytest.raises(UserError, match="no readable CLIP tokenizer"):
    load_tokenizer(tmp_path / "a")
