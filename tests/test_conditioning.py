"""Training and drawing tell the UNet the same, and what diffusers' pipelines tell it. C1, C18, P26.

The minis of the three families have tokenizers as SDXL's: the second pads with "!", id 0, and both
split words differently. No UNet runs: contexts are compared.
"""

import functools
import json
import re
import shutil
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import nnx
from PIL import Image

from cc_jax.bases.base import load_base
from cc_jax.bases.save import finish_base, save_base, save_module
from cc_jax.bases.tokenizer import train_tokenizer
from cc_jax.customcontrast.adapter_file import Adapter
from cc_jax.customcontrast.model import CustomContrast, Subject
from cc_jax.customcontrast.param_groups import is_trainable
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.models.unet import UNet2DCondition
from cc_jax.models.unet_config import UNetConfig
from cc_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from cc_jax.parallel.mesh import make_mesh
from cc_jax.plan.lower import generate_program, train_program
from cc_jax.sampling import conditions, pipeline, sample
from cc_jax.sampling.prompts import Prompts
from cc_jax.training import losses
from cc_jax.training.noise import StepNoise
from cc_jax.training.setup import adapter_configs, make_batches, make_step_context
from data_pipeline.errors import DataError
from data_pipeline.example import stack
from data_pipeline.sampling import SubjectTable
from data_pipeline.sources import render

TOKENS = 24
PROMPT, NOUN = "wow!! a duck on the beach", "duck"
LONG = "a duck on the beach" + " and the snow at night" * 5
TEXTS = {  # width, layers, activation, projection
  "sd15": [(12, 2, "quick_gelu", None)],
  "sd21": [(12, 2, "gelu", None)],
  "sdxl": [(12, 2, "quick_gelu", None), (16, 3, "gelu", 10)],
}
WORDS = (["wow!! a duck on the beach"], ["and the snow at night", "teddy bear duck"])
KINDS = list(TEXTS)
UNET = dict(sample_size=16, block_out_channels=[8], down_block_types=["CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D"], layers_per_block=1, norm_num_groups=4,
            attention_head_dim=2)  # fmt: skip
VAE = dict(tiny.VAE, block_out_channels=[4], down_block_types=["DownEncoderBlock2D"],
           up_block_types=["UpDecoderBlock2D"])  # fmt: skip


def write_base(root, kind):
  """A random base of the family's form; what the families share is copied."""
  folder, first = root / kind, root / KINDS[0]
  if kind != KINDS[0]:
    shutil.copytree(first, folder)
  towers = {}
  for index, (width, layers, act, projection) in enumerate(TEXTS[kind]):
    suffix = "_2" * index
    path = folder / f"tokenizer{suffix}"
    tokenizer = train_tokenizer(WORDS[index], path, 530 + 9 * index, TOKENS)
    if index:
      for file in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((path / file).read_text()) | {"pad_token": "!"}
        (path / file).write_text(json.dumps(values))
    config = CLIPTextConfig.from_dict(dict(
      architectures=["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
      hidden_size=width, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2,
      max_position_embeddings=TOKENS, hidden_act=act, projection_dim=projection or width,
      vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    towers[f"text_encoder{suffix}"] = CLIPTextModel, config
  if kind == "sd21":  # the same shapes
    for name, (_, config) in towers.items():
      (folder / name / "config.json").write_text(json.dumps(config.to_dict()))
    finish_base(folder, tiny.SCHEDULER)
    return
  unet = UNET | dict(cross_attention_dim=sum(width for width, *_ in TEXTS[kind]))
  if kind == "sdxl":
    unet |= dict(addition_embed_type="text_time", addition_time_embed_dim=4,
                 projection_class_embeddings_input_dim=10 + 6 * 4)  # fmt: skip
  networks = towers | {"unet": (UNet2DCondition, UNetConfig.from_dict(unet))}
  if kind == KINDS[0]:
    networks |= {
      "vae": (AutoencoderKL, AutoencoderKLConfig.from_dict(VAE)),
      "image_encoder": (CLIPVisionModel, CLIPVisionConfig.from_dict(tiny.VISION)),
    }
  for seed, (name, (cls, config)) in enumerate(networks.items()):
    save_module(tiny.random_module(cls, config, seed), folder / name)
  finish_base(folder, tiny.SCHEDULER | dict(prediction_type="epsilon"))


def random_adapter(model, *_, **__):
  """Stands for `apply_adapter`: says something with every tensor."""
  rng = np.random.default_rng(2)
  state = nnx.state(model, is_trainable)
  for _, leaf in nnx.to_flat_state(state):
    leaf.set_value(jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.get_value().dtype))
  nnx.update(model, state)


class Setup:
  """A family's base, an adapter with something to say, and both ways to the UNet."""

  def __init__(self, root, kind):
    self.kind, self.folder = kind, root / kind
    write_base(root, kind)
    # One group of layers: the text encoders run on as many sequences with S+ as without, else the
    # last bits would differ.
    self.config = tiny.tiny_config(
      self.folder, data__caption_drop_detail_prob=0.0, encoder__layer_groups=(4,),
      encoder__s_plus_pooled="s_plus")  # fmt: skip
    self.config.data.source = "render"
    self.base = load_base(self.folder)
    self.plain = pipeline.Pipeline(self.base)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(pipeline, "apply_adapter", random_adapter)
      adapter = Adapter({}, *adapter_configs(self.config), "", "", {})
      self.pipe = pipeline.Pipeline(self.base, adapter)
    self.model = self.pipe.sampler.merge(self.pipe.sampler.params)
    self.context = make_step_context(self.config, nnx.split(self.model)[0], self.base)

  @functools.cached_property
  def diffusers(self):
    """PyTorch's pipeline of the same folder, without what draws."""
    cls = (diffusers.StableDiffusionXLPipeline if self.kind == "sdxl"
           else diffusers.StableDiffusionPipeline)  # fmt: skip
    more = dict(add_watermarker=False) if self.kind == "sdxl" else dict(safety_checker=None)
    return cls.from_pretrained(self.folder, unet=None, vae=None, image_encoder=None,
                               feature_extractor=None, **more)  # fmt: skip

  def drawing(self, prompt=PROMPT, *arguments, plain=False, **options):
    """(SamplerInputs, SamplingConfig) of a call of the pipeline, in which nothing is drawn."""
    pipe, seen = self.plain if plain else self.pipe, []
    draw = pipe.sampler._sample

    def look(params, batch, *, config, tick):
      seen.append((batch, config))
      return types.SimpleNamespace(images=np.zeros((1, 16, 16, 3)), maps=())

    pipe.sampler._sample = look
    try:
      pipe(prompt, *arguments, steps=2, **options)
    finally:
      pipe.sampler._sample = draw
    return seen[0]

  def drawn(self, *arguments, plain=False, **options):
    """{branch of guidance: what the UNet is told} in drawing."""
    inputs, config = self.drawing(*arguments, plain=plain, **options)
    if plain:
      told = conditions.encode(sample.bundle(self.base), inputs, config)
      told = {name: x[None] for name, x in told.items()}
    else:
      encoded = conditions.encode(self.model, inputs, config)
      said = conditions.conditions(self.model, inputs, config, encoded)
      told = told_by(said(config.branches, 400, 0))
    rows = {name: np.split(np.asarray(x), len(config.branches), 1) for name, x in told.items()}
    return {
      branch: {name: values[i] for name, values in rows.items()}
      for i, branch in enumerate(config.branches)
    }

  def batch(self, monkeypatch, caption=PROMPT):
    """One row, as training's loader makes it of the caption."""
    monkeypatch.setattr(render, "batches", lambda maker, **_: maker)
    mesh = make_mesh(self.config.mesh, self.config.train.batch_size)
    maker = make_batches(self.config, self.base, 0, 0, mesh)
    picture = np.full((3, 20, 20, 3), 90, np.uint8)
    masks = np.full((3, 20, 20), 255, np.uint8)
    table = SubjectTable(*(np.zeros(1, np.int32) for _ in SubjectTable._fields))
    row = maker.example(np.random.default_rng(0), table, 0, picture, masks, caption, NOUN)
    return stack([row])

  def trained(self, monkeypatch, reference=None, *, text=True, image=True):
    """What the UNet is told in training."""
    seen = []

    def look(self, latents, t, conditioning):
      seen.append(conditioning)
      return latents

    monkeypatch.setattr(CustomContrast, "predict", look)
    monkeypatch.setattr(losses, "target_latents", lambda *_: jnp.zeros((1, 16, 16, 4)))
    batch = self.batch(monkeypatch)
    if reference is not None:
      batch["reference"] = reference
    features, _ = self.model.image_features(batch["reference"] / np.float32(255))
    noise = StepNoise(
      jnp.full(1, 400), jnp.asarray([text]), jnp.asarray([image]),
      jax.random.split(jax.random.key(0), 1),
    )  # fmt: skip
    shown = self.model.encode(features, noise.t, noise.keep_image)
    losses.denoise(self.context, self.model, batch, shown, noise)
    return told_by(seen[0])


def told_by(conditioning):
  """The parts of a Conditioning that the UNet reads, [layers or 1, B, ...]."""
  layers = conditioning.context
  told = dict(context=np.stack([layer.text for layer in layers]),
              visual=np.stack([layer.visual for layer in layers]))  # fmt: skip
  if conditioning.text_embeds is not None:
    told |= dict(text_embeds=np.asarray(conditioning.text_embeds)[None],
                 time_ids=np.asarray(conditioning.time_ids)[None])  # fmt: skip
  return told


def assert_same(found, expected):
  """To the bit."""
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def quick_features():
  """The image encoder is not what is tested: a picture's features are some of its pixels."""

  def image_features(self, pixels):
    return jnp.resize(jnp.asarray(pixels), (len(pixels), self.image_tokens, self.image_width)), None

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(CustomContrast, "image_features", image_features)
    yield


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
  root = tmp_path_factory.mktemp("conditioning")
  made = {KINDS[0]: Setup(root, KINDS[0])}  # the others copy of its folder
  return lambda kind: made.get(kind) or made.setdefault(kind, Setup(root, kind))


@pytest.fixture(params=KINDS)
def setup(request, setups):
  return setups(request.param)


@pytest.fixture(scope="module")
def picture():
  pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
  alpha = np.zeros((20, 20, 1), np.uint8)
  alpha[3:15, 4:18] = 255
  return Image.fromarray(np.concatenate([pixels, alpha], axis=2))


# ---- training and drawing


def test_training_tells_the_unet_what_drawing_does(setup, picture, monkeypatch):  # C1, P1
  """With S+, without it (no reference), and with an empty prompt."""
  inputs, _ = setup.drawing(PROMPT, NOUN, [picture])
  with_s_plus = setup.drawn(PROMPT, NOUN, [picture])
  trained = functools.partial(setup.trained, monkeypatch, inputs.references[0])
  assert_same(trained(), with_s_plus[sample.FULL])
  without = setup.drawn(PROMPT)[sample.FULL]
  del without["visual"]  # at a scale of 0, with another t
  assert_same({name: x for name, x in trained(image=False).items() if name in without}, without)
  assert_same(trained(text=False, image=False), with_s_plus[sample.EMPTY])
  assert np.abs(with_s_plus[sample.FULL]["context"] - without["context"]).max() > 1e-2


def test_sizes_agree(setups, picture, monkeypatch):
  """A whole picture of 16 px, in training and in drawing."""
  told = setups("sdxl").trained(monkeypatch)["time_ids"], setups("sdxl").drawn()[sample.FULL]
  for time_ids in (told[0], told[1]["time_ids"]):
    np.testing.assert_array_equal(time_ids, [[[16, 16, 0, 0, 16, 16]]])


def test_each_tokenizer_pads_and_splits_its_own_way(setups, picture):  # P1
  """transformers' own ids; "!!" is one token of the first and two pads of the second."""
  setup = setups("sdxl")
  inputs, _ = setup.drawing(PROMPT, NOUN, [picture])
  slots = []
  for tokenizer, ids, slot, span in zip(setup.base.tokenizers, *inputs.prompts[:3]):
    wanted = tokenizer(PROMPT, padding="max_length", max_length=TOKENS)["input_ids"]
    np.testing.assert_array_equal(ids[0], wanted)
    assert tokenizer.decode(ids[0][slice(*span[0])]).strip() == NOUN and slot[0] == span[0, 1]
    slots.append(int(slot[0]))
  assert slots[0] != slots[1]
  assert setup.base.tokenizers[1].pad_token_id == 0 != setup.base.tokenizers[0].pad_token_id


def test_two_subjects_have_places_for_each_encoder(setups, picture):  # P1
  setup = setups("sdxl")
  nouns = ["duck", "teddy bear"]
  inputs, _ = setup.drawing("wow!! a duck!! and a teddy bear", nouns, [[picture], [picture]])
  (first, second), ids = inputs.prompts.extra_subjects[0][0], inputs.prompts.ids
  assert first[0] != second[0]
  features, _ = setup.model.image_features(inputs.references[0] / np.float32(255))

  def told(encoders):
    choose = lambda arrays: tuple(arrays[k] for k in encoders)  # noqa: E731
    also = Subject(features + 1, *map(choose, inputs.prompts.extra_subjects[0]))
    prompts = map(choose, inputs.prompts[:3])
    return told_by(setup.model.condition(features, *prompts, jnp.full(1, 400), also=[also]))

  found = told((0, 1))["context"]
  for encoder, part in enumerate((slice(0, 12), slice(12, None))):
    # The other encoder's part is nonsense then: the ids are not its own.
    alone = told((encoder, encoder))["context"]
    np.testing.assert_array_equal(found[..., part], alone[..., part])
  for tokenizer, row, *spans in zip(setup.base.tokenizers, ids, inputs.prompts.noun_span,
                                    inputs.prompts.extra_subjects[0][1]):  # fmt: skip
    said = [tokenizer.decode(row[0][slice(*span[0])]).strip() for span in spans]
    assert said == nouns


def test_wrong_words_of_the_gap_are_wrong_for_both_encoders(setups):  # P1
  from cc_jax.training.prompt_sensitivity import wrong_nouns
  from data_pipeline.tokens import encode_prompt, prompt_keys

  tokenizers = setups("sdxl").base.tokenizers

  def batch(*captions):
    rows = {}
    for keys, tokenizer in zip(prompt_keys(2), tokenizers):
      values = zip(*(encode_prompt(tokenizer, *caption, 2) for caption in captions))
      rows |= {key: np.stack(value) for key, value in zip(keys, values)}
    return rows

  right = batch(("a duck!! at night", "duck"), ("the teddy bear", "teddy bear"))
  wrong, changed = wrong_nouns(right, tokenizers, 2)
  expected = batch(("a teddy bear!! at night", "teddy bear"), ("the duck", "duck"))
  assert changed.all() and wrong.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(wrong[key], value, err_msg=key)


def test_the_plan_knows_the_shapes(setups, picture, monkeypatch):
  """Of a training batch, and of what drawing hands over, for two text encoders."""
  setup = setups("sdxl")
  mesh = make_mesh(setup.config.mesh, setup.config.train.batch_size)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape[1:], np.dtype(x.dtype)), tree)  # noqa: E731
  planned = train_program(setup.config, mesh).parts["batch"]
  assert shapes(planned) == shapes(setup.batch(monkeypatch))
  planned = generate_program(setup.config, mesh).parts["batch"]
  inputs, _ = setup.drawing(PROMPT, NOUN, [picture])
  for name in ("prompts", "negative", "references", "noise", "time_ids"):
    assert shapes(getattr(planned, name)) == shapes(getattr(inputs, name)), name


# ---- diffusers


def their_prompt(setup, prompt, negative):
  """[(context, pooled or None)] of the negative and the prompt, by diffusers' encode_prompt."""
  with torch.no_grad():
    found = setup.diffusers.encode_prompt(
      prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
      negative_prompt=negative,
    )  # fmt: skip
  prompt, negative, *pooled = (x.numpy() for x in found)
  pooled = pooled[::-1] or [None, None]
  return list(zip((negative, prompt), pooled))


def assert_near(found, wanted):
  error = np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-9)
  assert error < 1e-5


@pytest.mark.parametrize("negative", [None, "", "the snow"])
def test_contexts_are_those_of_diffusers(setup, negative):  # C18, P2
  """Of the base alone and of the adapter's model without a reference; zeros where SDXL has them."""
  wanted = their_prompt(setup, PROMPT, negative)
  for plain in (True, False):
    found = setup.drawn(PROMPT, plain=plain, negative_prompt=negative)
    assert list(found) == [sample.EMPTY, sample.FULL]
    for branch, (context, pooled) in zip((sample.EMPTY, sample.FULL), wanted):
      told = found[branch]["context"][0]
      assert_near(told, context)
      assert bool(told.any()) == (branch == sample.FULL or setup.kind != "sdxl" or
                                  negative is not None)
      if pooled is not None:
        assert_near(found[branch]["text_embeds"][0], pooled)


@pytest.mark.parametrize("written", [True, False, None])
def test_force_zeros_for_empty_prompt_is_read_and_kept(setups, written, tmp_path, monkeypatch):
  """As diffusers reads it, also where the key is absent."""  # P2
  setup = setups("sdxl")
  folder = tmp_path / "base"
  shutil.copytree(setup.folder, folder)
  index = json.loads((folder / "model_index.json").read_text())
  del index["force_zeros_for_empty_prompt"]
  index |= {} if written is None else {"force_zeros_for_empty_prompt": written}
  (folder / "model_index.json").write_text(json.dumps(index))
  theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(
    folder, unet=None, vae=None, image_encoder=None, feature_extractor=None, text_encoder=None,
    text_encoder_2=None, add_watermarker=False)  # fmt: skip
  base = load_base(folder)
  expected = theirs.config.force_zeros_for_empty_prompt
  assert base.force_zeros_for_empty_prompt == expected == (written is not False)
  save_base(base, tmp_path / "again")
  assert load_base(tmp_path / "again").force_zeros_for_empty_prompt == expected
  if written is False:
    other = setup.diffusers.__class__(**theirs.components | {
      name: setup.diffusers.components[name] for name in ("text_encoder", "text_encoder_2")
    }, force_zeros_for_empty_prompt=False, add_watermarker=False)  # fmt: skip
    wanted = their_prompt(types.SimpleNamespace(diffusers=other), PROMPT, None)
    monkeypatch.setattr(setup.base, "force_zeros_for_empty_prompt", False)
    assert_near(setup.drawn(PROMPT)[sample.EMPTY]["context"][0], wanted[0][0])


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_evaluation_and_laboratory_say_nothing_as_drawing_does(setups, kind):  # P2
  from cc_jax.lab import pictures
  from cc_jax.lab.trial_scores import draw_trials

  setup, said = setups(kind), []

  class Sampler:
    is_subject_model = True

    def noise(self, seeds):
      return None

    def __call__(self, prompts, negative, **_):
      said.append((prompts, negative))
      return np.zeros((1, 16, 16, 3)), ()

  references = np.zeros((1, 16, 16, 3), np.uint8)
  trials = types.SimpleNamespace(prompts=[PROMPT], nouns=[NOUN], references=references)
  draw_trials(Sampler(), setup.base, trials, setup.config.sample, s_words=2, scale=1.0,
              batch_size=1)  # fmt: skip
  pipe = types.SimpleNamespace(base=setup.base, s_words=2, sampler=Sampler())
  pictures.draw(pipe, [PROMPT], [NOUN], references, [0])
  inputs, _ = setup.drawing(PROMPT, NOUN, [Image.new("RGBA", (8, 8), "red")])
  for prompts, negative in said:
    jax.tree.map(np.testing.assert_array_equal, prompts, inputs.prompts)
    assert (negative is None) == (inputs.negative is None) == (kind == "sdxl")
    if negative is not None:
      jax.tree.map(np.testing.assert_array_equal, negative.ids, inputs.negative)
  assert len(said) == 2


# ---- guidance


@pytest.mark.parametrize("guidance, image_guidance, branches, number", [
  (0.0, None, (sample.FULL,), 4),
  (1.0, None, (sample.FULL,), 4),
  (1.5, None, (sample.EMPTY, sample.FULL), 1 + 1.5 * (4 - 1)),
  (0.0, 1.0, (sample.FULL,), 4),
  (0.5, 3.0, (sample.TEXT, sample.FULL), 2 + 3 * (4 - 2)),
  (3.0, 0.0, (sample.EMPTY, sample.TEXT, sample.FULL), 1 + 3 * (2 - 1) + (4 - 2)),
])  # fmt: skip
def test_guidance_up_to_1_is_none(  # P3
  setups, picture, monkeypatch, guidance, image_guidance, branches, number
):
  """One pass, with the prompt, as in diffusers; turbo models' cards say 0. Worked out by hand."""
  given = dict(guidance=guidance, image_guidance=image_guidance)
  setup = setups("sd15")
  inputs, config = setup.drawing(PROMPT, NOUN, [picture], **given)
  assert config.branches == branches
  predicted = {sample.EMPTY: 1.0, sample.TEXT: 2.0, sample.FULL: 4.0}
  monkeypatch.setattr(sample, "encode", lambda *_: None)
  monkeypatch.setattr(sample, "conditions", lambda *_: lambda names, t, step: names)
  monkeypatch.setattr(sample, "_predict", lambda model, x, t, names: jnp.stack(
    [jnp.full(x.shape[1:], predicted[name]) for name in names]))  # fmt: skip
  once = lambda denoise, noise, table, **_: (denoise(noise, 400, 0), None)  # noqa: E731
  monkeypatch.setattr(sample, "integrate", once)
  monkeypatch.setattr(sample, "latents_to_images", lambda vae, latents: latents)
  images = sample.sample_images(lambda _: setup.model, None, inputs, config).images
  np.testing.assert_allclose(images, number)


# ---- long prompts


def test_long_prompts_are_cut_as_diffusers_cuts_them(setups, picture, monkeypatch):  # P26
  """Prompt and negative prompt, by each tokenizer; what was left out is named."""
  setup, negative = setups("sdxl"), " teddy bear duck" * 12
  with pytest.warns(UserWarning) as warned:
    found = setup.drawn(LONG, negative_prompt=negative)
  said = [str(w.message) for w in warned if "left out" in str(w.message)]
  assert re.match("the prompt 'a duck .*left out: '.*the snow at night'; .*'chunk'", said[0])
  assert re.match("the prompt ' teddy .*left out: '.*teddy bear duck'; ", said[1])
  wanted = their_prompt(setup, LONG, negative)
  for branch, (context, pooled) in zip((sample.EMPTY, sample.FULL), wanted):
    assert_near(found[branch]["context"][0], context)
    assert_near(found[branch]["text_embeds"][0], pooled)
  with pytest.raises(DataError, match="cut after 22 tokens, before its class noun 'duck'"):
    setup.drawing(" and the snow at night" * 5 + " a duck", NOUN, [picture])
  with pytest.raises(DataError, match="tokens; the limit is 24"):
    setup.drawing(LONG, long_prompts="error")
  with pytest.raises(DataError, match="shorten"):  # a caption is the user's to shorten
    setup.batch(monkeypatch, LONG)


def test_long_prompts_in_pieces(setups):  # P26
  """Each piece through PyTorch's encoders, one behind the other; the shorter prompt is filled."""
  setup, negative = setups("sdxl"), "the snow"
  found = setup.drawn(LONG, negative_prompt=negative, long_prompts="chunk")
  theirs = setup.diffusers
  towers = (theirs.tokenizer, theirs.text_encoder), (theirs.tokenizer_2, theirs.text_encoder_2)
  pieces = {}
  for text, branch in ((LONG, sample.FULL), (negative, sample.EMPTY)):
    for number, (tokenizer, _) in enumerate(towers):
      content = tokenizer(text, add_special_tokens=False)["input_ids"]
      pieces[branch, number] = [
        content[at : at + TOKENS - 2] for at in range(0, len(content), TOKENS - 2)
      ]
  count = max(map(len, pieces.values()))
  assert count > 2 and len(pieces[sample.EMPTY, 0]) == 1
  for branch in (sample.EMPTY, sample.FULL):
    states = []
    for number, (tokenizer, tower) in enumerate(towers):
      rows = pieces[branch, number] + [[]] * (count - len(pieces[branch, number]))
      rows = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]
      rows = [row + [tokenizer.pad_token_id] * (TOKENS - len(row)) for row in rows]
      with torch.no_grad():
        out = tower(torch.tensor(rows), output_hidden_states=True)
      states.append(out.hidden_states[-2].reshape(1, count * TOKENS, -1).numpy())
    assert_near(found[branch]["context"][0], np.concatenate(states, axis=-1))
    assert_near(found[branch]["text_embeds"][0], out.text_embeds[:1].numpy())


def test_s_plus_stands_in_its_own_piece(setups, picture):  # P26
  """That piece is what it is alone, the others are without S+."""
  setup = setups("sdxl")
  inputs, config = setup.drawing(
    " and the snow at night" * 5 + " a duck", NOUN, [picture], guidance=1, long_prompts="chunk")
  model, prompts = setup.model, inputs.prompts
  features, _ = model.image_features(inputs.references[0] / np.float32(255))

  def told(prompts, **options):
    condition = model.condition(features, *prompts[:3], jnp.full(1, 400), **options)
    return told_by(condition)["context"]

  count = prompts.ids[0].shape[1]
  whole = np.split(told(prompts), count, axis=2)
  without = np.split(told(prompts, use_s_plus=False), count, axis=2)
  pieces = [int(slot[0]) // TOKENS for slot in prompts.slot]
  assert max(pieces) > 0 and len(set(pieces)) == 2  # by chance in different ones
  for encoder, (piece, part) in enumerate(zip(pieces, (slice(0, 12), slice(12, None)))):
    for number in range(count):
      same = np.array_equal(whole[number][..., part], without[number][..., part])
      assert same == (number != piece)
    alone = [array[:, piece] if array.ndim == 3 else array % TOKENS for array in (
      prompts.ids[encoder], prompts.slot[encoder], prompts.noun_span[encoder])]  # fmt: skip
    alone = told(Prompts(*((array,) * 2 for array in alone)))
    np.testing.assert_array_equal(whole[piece][..., part], alone[..., part])


@pytest.mark.parametrize("fill", range(0, 60, 3))
def test_a_noun_and_its_s_plus_stay_in_one_piece(setups, fill):  # P26
  from data_pipeline.tokens import tokenize

  prompt = "snow " * fill + "a teddy bear, " + "night " * (fill // 2) + "a duck on"
  for tokenizer in setups("sdxl").base.tokenizers:
    found = tokenize(tokenizer, prompt, ("teddy bear", "duck"), 2, long_prompts="chunk")
    flat, inserted = found.ids.reshape(-1), np.zeros(len(found.ids), int)
    for noun, slot, (start, end) in zip(("teddy bear", "duck"), found.slots, found.noun_spans):
      assert tokenizer.decode(flat[start:end]).split() == noun.split() and slot == end
      assert start // TOKENS == (end - 1) // TOKENS == slot // TOKENS
      inserted[slot // TOKENS] += 2
    content = []
    for piece, more in zip(found.ids.tolist(), inserted):
      end = piece.index(tokenizer.eos_token_id)
      assert piece[0] == tokenizer.bos_token_id and end + more < TOKENS
      assert set(piece[end + 1 :]) <= {tokenizer.pad_token_id}
      content += piece[1:end]
    assert content == tokenizer(prompt)["input_ids"][1:-1]
