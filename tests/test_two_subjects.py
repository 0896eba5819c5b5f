"""Two subjects in one prompt, each behind its own noun, and what lies between two subjects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from test_customcontrast import BOS, EOS, B, L, T, configs, split

from cc_jax.bases.base import load_base, random_base
from cc_jax.customcontrast.adapter_file import adapter_tensors, save_adapter
from cc_jax.customcontrast.injection import InjectionConfig
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.customcontrast.model import CustomContrast, Subject
from cc_jax.errors import UserError
from cc_jax.models.rngs import abstract
from cc_jax.sampling.conditions import _repeat_visual_tokens
from cc_jax.sampling.pipeline import load
from cc_jax.sampling.prompts import encode_prompts
from data_pipeline.errors import DataError

pytestmark = pytest.mark.usefixtures("quick_compile")
PROMPT, NOUNS = "a duck, a teddy bear at night", ("duck", "teddy bear")


@pytest.fixture(scope="module")
def parts():
  return split(layer_groups=(1, L - 1))


@pytest.fixture(scope="module")
def asked():
  """Two prompts with a noun for each of two subjects, and both subjects' pictures."""
  rng = np.random.default_rng(1)
  ids = np.full((B, T), EOS, np.int32)
  ids[:, 0], ids[:, 1:6] = BOS, rng.integers(2, 20, (B, 5))
  return dict(
    ids=jnp.asarray(ids),
    slots=(jnp.asarray([2] * B), jnp.asarray([5] * B)),
    spans=(jnp.asarray([[1, 2]] * B), jnp.asarray([[3, 5]] * B)),
    pixels=[jnp.asarray(rng.random((B, 8, 8, 3), np.float32)) for _ in range(2)],
    t=jnp.full(B, 400),
  )


@pytest.fixture(scope="module")
def seen(parts, asked):
  """{what: (conditioning, tokens of each subject)} of one jitted function."""
  graphdef, *states = parts

  @jax.jit
  def look(states, weight):
    model = nnx.merge(graphdef, *states)
    features = [model.image_features(p)[0] for p in asked["pixels"]]
    slots, spans = asked["slots"], asked["spans"]
    say = lambda k, at, **more: model.condition(  # noqa: E731
      features[k], asked["ids"], slots[at], spans[at], asked["t"], **more)
    other = Subject(features[1], slots[1], spans[1])
    empty = model.condition(None, asked["ids"], None, None, asked["t"])
    latents = jnp.ones((B, 4, 4, 4))
    return dict(
      one=say(0, 0), two=say(0, 0, also=[other]), second=say(1, 0),
      between=say(0, 0, toward=(other, weight)),
      both=[model.encode(f, asked["t"]) for f in features],
      plain=model.predict(latents, asked["t"], empty),
      copies=model.predict(latents, asked["t"], _repeat_visual_tokens(empty, 2)),
    )

  return look(states, jnp.asarray([0.0, 1.0])), nnx.merge(graphdef, *states)


def test_each_subject_stands_behind_its_own_noun(asked, seen):
  """The texts are what the frozen encoder makes of two list inserts, the visual tokens a list."""
  found, model = seen
  tower = model.text_encoders[0]
  embeddings = np.asarray(tower.token_embedding(asked["ids"]))
  for group in range(2):
    rows = []
    for b in range(B):
      row, moved = list(embeddings[b]), 0
      for k in range(2):
        start, end = asked["spans"][k][b]
        norm = np.mean([np.linalg.norm(e) for e in embeddings[b, start:end]])
        for w in range(2):
          word = np.asarray(found["both"][k].words[0][group, b, w])
          row.insert(int(asked["slots"][k][b]) + moved, word * norm / np.linalg.norm(word))
          moved += 1
      rows.append(row[:T])
    expected = jax.jit(lambda e: tower(inputs_embeds=e, pool_ids=asked["ids"]).last_hidden_state)(
      jnp.asarray(rows))
    layers = [layer for layer, g in enumerate((0, *[1] * (L - 1))) if g == group]
    for layer in layers:
      context = found["two"].context[layer]
      np.testing.assert_allclose(context.text, expected, atol=1e-5)
      fused = [one.fused[group] for one in found["both"]]
      np.testing.assert_allclose(context.visual, jnp.concatenate(fused, 1), atol=1e-5)
  assert np.abs(found["two"].context[0].text - found["one"].context[0].text).max() > 1e-2
  np.testing.assert_allclose(found["two"].text, found["one"].text, atol=1e-5)  # without S+


def test_tokens_twice_over_say_the_same(seen):
  """Guidance holds a branch without image against one with two subjects' tokens."""
  found, _ = seen
  np.testing.assert_allclose(found["copies"], found["plain"], rtol=1e-5, atol=1e-5)


def test_between_two_subjects(seen):
  found, _ = seen
  for layer in range(L):
    one, two, both = (found[k].context[layer] for k in ("one", "second", "between"))
    for name in ("text", "visual"):
      ends = getattr(one, name), getattr(two, name)
      np.testing.assert_allclose(getattr(both, name)[0], ends[0][0], atol=1e-5)
      np.testing.assert_allclose(getattr(both, name)[1], ends[1][1], atol=1e-5)
    assert np.abs(one.visual[1] - two.visual[1]).max() > 1e-2


def test_no_room_for_two(parts, asked):
  model = nnx.merge(*parts)
  ids = asked["ids"].at[:, 1:8].set(5)  # EOS at 8 of 11: room for one subject's words alone
  other = Subject(None, asked["slots"][1], asked["spans"][1])
  with pytest.raises(UserError, match="shorten it by 2 tokens"):
    model.condition(jnp.zeros((B, 5, 20)), ids, *(asked[k][0] for k in ("slots", "spans")),
                    asked["t"], also=[other])


# ---- in a picture


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  folder = tiny.tiny_base(tmp_path_factory.mktemp("two") / "base")
  base, config = load_base(folder), tiny.tiny_config(folder)
  encoder = MFIEncoderConfig.from_config(config.encoder)
  injection = InjectionConfig.from_config(config.injection)
  model = abstract(lambda rngs: CustomContrast(
    random_base(folder), encoder, injection, rngs=rngs))
  rng = np.random.default_rng(2)
  tensors = {
    name: (rng.standard_normal(x.shape) / np.sqrt(x.shape[0] if x.ndim > 1 else 1)).astype("f4")
    for name, x in adapter_tensors(model).items()
  }
  file = folder.parent / "adapter.safetensors"
  save_adapter(file, tensors, encoder=encoder, injection=injection, base_name=str(folder),
               base_hash=base.hash)
  return load(file)


@pytest.fixture(scope="module")
def shown():
  """Two subjects and another second one."""
  rng = np.random.default_rng(3)
  alpha = np.zeros((20, 20, 1), np.uint8)
  alpha[4:16, 5:15] = 255
  return [Image.fromarray(np.concatenate([p, alpha], -1))
          for p in rng.integers(0, 256, (3, 20, 20, 3), np.uint8)]


def far(a, b):
  return int(np.max(np.abs(np.asarray(a, int) - np.asarray(b, int))))


def test_both_subjects_count_in_a_picture(pipe, shown):
  draw = lambda *pair: pipe(PROMPT, NOUNS, [[p] for p in pair], steps=2, seed=1)[0]  # noqa: E731
  both = draw(shown[0], shown[1])
  assert far(both, draw(shown[0], shown[1])) == 0
  assert far(both, draw(shown[0], shown[2])) > 3 and far(both, draw(shown[2], shown[1])) > 3
  assert far(both, pipe(PROMPT, NOUNS, [shown[0], shown[1]], steps=2, seed=1)[0]) == 0
  base = pipe(PROMPT, steps=2, seed=1)[0]
  assert far(pipe(PROMPT, NOUNS, shown[:2], steps=2, seed=1, scale=0)[0], base) <= 1
  assert far(both, base) > 3


def test_mistakes_with_two_subjects(pipe, shown):
  with pytest.raises(DataError, match="names 'duck' before 'teddy bear'"):
    pipe(PROMPT, NOUNS[::-1], shown[:2])
  with pytest.raises(UserError, match="1 lists of references and 2 of masks for 2 class nouns"):
    pipe(PROMPT, NOUNS, shown[:1])
  with pytest.raises(UserError, match="a subject has no reference"):
    pipe(PROMPT, NOUNS, [shown[:1], []])
  with pytest.raises(DataError, match="'duck' 1 times, not 2"):
    pipe(PROMPT, ("duck", "duck"), shown[:2])


def test_a_noun_that_comes_twice(pipe):
  tokenizers = pipe.base.tokenizers
  once = encode_prompts(tokenizers, ["a duck and a duck"], [("duck",)], s_words=2)
  twice = encode_prompts(tokenizers, ["a duck and a duck"], [("duck", "duck")], s_words=2)
  assert twice.slot[0][0] == once.slot[0][0] and once.extra_subjects == ()
  ((slot,), (span,)), = twice.extra_subjects
  assert slot[0] > once.slot[0][0] and span[0, 1] == slot[0]
  ids = twice.ids[0][0]
  assert list(ids[span[0, 0] : span[0, 1]]) == list(ids[slice(*twice.noun_span[0][0])])


def test_configs_of_the_variants():
  """What the laboratory switches on: no S+ at all, and a head that only the contrast sees."""
  encoder, _ = configs(s_plus_space="none")
  assert encoder.s_plus_space == "none"
  with pytest.raises(UserError, match="contrast_head is -1"):
    configs(contrast_head=-1)


def test_without_s_plus_the_prompt_stays_as_it_is_and_a_head_changes_the_contrast_alone(asked):
  graphdef, trainable, frozen = split(s_plus_space="none", contrast_head=5)

  @jax.jit
  def look(trainable, frozen):
    model = nnx.merge(graphdef, trainable, frozen)
    features, _ = model.image_features(asked["pixels"][0])
    said = model.condition(
      features, asked["ids"], asked["slots"][0], asked["spans"][0], asked["t"])
    plain = model.condition(None, asked["ids"], None, None, asked["t"])
    tokens = model.mfi_encoder.textual(features, asked["t"])[1]
    fused = model.mfi_encoder.fusion(tokens, model.visual(features)[1])
    return said, plain, tokens, fused

  said, plain, tokens, fused = look(trainable, frozen)
  for layer in range(L):
    np.testing.assert_allclose(said.context[layer].text, plain.context[layer].text, atol=1e-6)
    np.testing.assert_allclose(said.context[layer].visual, fused[layer], atol=1e-5)
    assert np.abs(said.context[layer].visual - plain.context[layer].visual).max() > 1e-2
  assert np.abs(said.textual_tokens - tokens).max() > 1e-2
