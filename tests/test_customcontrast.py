"""CustomContrast as a whole, on a small random base: what it leaves alone and what it can learn.

Weights are drawn by name, so that every variant below sits on the same base, and the untouched base
is the oracle. One compilation per variant gives prediction, maps, conditioning and gradients.
"""

import functools
import re
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cc_jax.customcontrast.adapter_file import adapter_tensors, apply_adapter
from cc_jax.customcontrast.injection import InjectionConfig, scale_per_layer
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.customcontrast.model import Conditioning, CustomContrast
from cc_jax.customcontrast.param_groups import is_trainable, param_options
from cc_jax.errors import UserError
from cc_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.models.image_encoder import ImageEncoder
from cc_jax.models.rngs import abstract
from cc_jax.models.unet import UNet2DCondition, UNetConfig
from cc_jax.training import optimizer
from configs import sd15, subjects3d

L, B, T, WIDTH, BOS, EOS = 4, 2, 11, 12, 28, 29
UNET = dict(
  sample_size=4,
  block_out_channels=[8],
  down_block_types=["CrossAttnDownBlock2D"],
  up_block_types=["CrossAttnUpBlock2D"],
  layers_per_block=1,
  norm_num_groups=4,
  cross_attention_dim=WIDTH,
  attention_head_dim=2,
)
TEXT = dict(vocab_size=30, intermediate_size=16, num_attention_heads=2, bos_token_id=BOS,
            eos_token_id=EOS, max_position_embeddings=T, hidden_size=WIDTH, num_hidden_layers=1)
VISION = dict(hidden_size=10, intermediate_size=14, num_hidden_layers=2, num_attention_heads=2,
              image_size=8, patch_size=4, projection_dim=6,
              architectures=["CLIPVisionModelWithProjection"])


class Parts(nnx.Module):
  """A base's networks."""

  def __init__(self, unet, texts, vision, dtype=jnp.float32, *, rngs):
    kinds = dict(dtype=dtype, param_dtype=dtype, rngs=rngs)
    self.unet = UNet2DCondition(UNetConfig.from_dict(unet), **kinds)
    towers = (CLIPTextModel(CLIPTextConfig.from_dict(text), **kinds) for text in texts)
    self.text_encoders = nnx.List(towers)
    self.image_encoder = CLIPVisionModel(CLIPVisionConfig.from_dict(vision), **kinds)

  def base(self):
    return types.SimpleNamespace(
      unet=self.unet,
      vae=None,
      text_encoders=tuple(self.text_encoders),
      image_encoder=self.image_encoder,
      image_processor=dict(mean=(0.5, 0.4, 0.3), std=(0.3, 0.3, 0.2), size=8),
      force_zeros_for_empty_prompt=False,
    )


@functools.cache
def default_parts():
  """(graphdef, abstract state) of the base that most tests use: text also pooled, as in the lab."""
  unet = dict(UNET, addition_embed_type="text", addition_embed_type_num_heads=2)
  return nnx.split(abstract(lambda rngs: Parts(unet, (TEXT,), VISION, rngs=rngs)))


def configs(**changes):
  c = subjects3d.get_config()
  c.encoder.update(image_layers=(1, 2), width=WIDTH, heads=2, depth=1, visual_queries=3)
  c.encoder.update(textual_queries=3, s_words=2, s_plus_pooled="plain")
  for key, value in changes.items():
    section = c.encoder if key in c.encoder else c.injection
    section[key] = value
  return MFIEncoderConfig.from_config(c.encoder), InjectionConfig.from_config(c.injection)


def values_by_name(name, shape):
  """The same numbers for the same name; the injected attention's name is the untouched one's."""
  rng = np.random.default_rng(zlib.crc32(name.replace("attn2.attn.", "attn2.").encode()))
  x = rng.normal(size=shape).astype(np.float32)
  last = name.split(".")[-1]
  if last == "scale":
    x = 1 + 0.1 * x
  elif last == "kernel":
    x = x / np.sqrt(np.prod(shape[:-1]))
  return jnp.asarray(x)


def filled(state):
  return jax.tree.map_with_path(
    lambda path, x: values_by_name(".".join(str(getattr(p, "key", p)) for p in path[:-1]), x.shape),
    state,
  )


def split(parts=None, **changes):
  """(graphdef, trainable, frozen), every tensor random, gates and location maps included."""
  definition, state = default_parts() if parts is None else parts

  model = abstract(
    lambda rngs: CustomContrast(
      nnx.merge(definition, jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), state)).base(),
      *configs(**changes),
      rngs=rngs,
    )
  )
  graphdef, *states = nnx.split(model, is_trainable, ...)
  return graphdef, *(filled(state) for state in states)


def names(state):
  return {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(state)}


def run(graphdef, trainable, frozen, x):
  """(diffusion-like loss, everything else): one function for all tests of one variant."""
  model = nnx.merge(graphdef, trainable, frozen)
  features, _ = model.image_features(x["pixels"])
  conditioning = model.condition(
    features, x["ids"], x["slot"], x["span"], x["t"],
    use_image=x["use_image"], use_s_plus=x["use_s_plus"], scale=x["scale"],
  )
  prediction, maps = model.predict(x["latents"], x["t"], conditioning, maps=True)
  return jnp.mean((prediction - x["noise"]) ** 2), (prediction, maps, conditioning)


step = jax.jit(jax.value_and_grad(run, argnums=1, has_aux=True), static_argnums=0)


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
  """Compilation is most of this file's time."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def x():
  rng = np.random.default_rng(5)
  ids = np.full((B, T), EOS)
  ids[:, 0], ids[0, 1:6], ids[1, 1:5] = BOS, [3, 4, 5, 6, 7], [8, 9, 10, 11]
  normal = lambda: jnp.asarray(rng.normal(size=(B, 4, 4, 4)), jnp.float32)  # noqa: E731
  return dict(
    pixels=jnp.asarray(rng.uniform(size=(B, 8, 8, 3)), jnp.float32),
    latents=normal(),
    noise=normal(),
    ids=jnp.asarray(ids),
    slot=jnp.asarray([3, 5]),
    span=jnp.asarray([[2, 3], [3, 5]]),
    t=jnp.asarray([20, 700]),
    use_image=jnp.ones(B, bool),
    use_s_plus=jnp.ones(B, bool),
    scale=jnp.ones((L, B)),
  )


@pytest.fixture(scope="module")
def untouched(x):
  """The plain base's prediction for the prompt."""
  definition, state = default_parts()

  @jax.jit
  def predict(state):
    parts = nnx.merge(definition, state)
    return parts.unet(
      x["latents"], x["t"], parts.text_encoders[0](x["ids"]).last_hidden_state
    )

  return predict(filled(state))


@pytest.fixture(scope="module")
def default():
  return split()


def at_start(trainable):
  """As the constructor starts it: gates and the maps' last layers at zero (checked elsewhere)."""
  flat = nnx.to_flat_state(trainable)
  zero = lambda path: path[-1] == "gate" or path[-3:-1] == ("location", "out")  # noqa: E731
  return nnx.from_flat_state([
    (path, v.replace(jnp.zeros(v.shape)) if zero(path) else v) for path, v in flat
  ])


FORMS = {
  "complementary": {},
  "visual_only": dict(
    form="visual_only", location=False, low_rank=2, width=8, timestep_layer="none",
    s_plus_space="shared", s_plus_norm="free",
  ),
  "shared": dict(
    form="shared", fusion="visual_tokens", layer_groups=(1, 3), s_words=1, s_plus_pooled="s_plus",
    textual_cls="last",
  ),
}


@pytest.fixture(scope="module", params=FORMS)
def variant(request):
  return request.param, *split(**FORMS[request.param])


def test_start_and_scale_zero_are_the_base(variant, x, untouched):
  _, graphdef, trainable, frozen = variant
  close = dict(rtol=0, atol=1e-6 * float(jnp.max(jnp.abs(untouched))))
  plain = {**x, "use_s_plus": jnp.zeros(B, bool)}
  predict = lambda adapter, x: step(graphdef, adapter, frozen, x)[0][1][0]  # noqa: E731
  start = at_start(trainable)
  np.testing.assert_allclose(predict(start, plain), untouched, **close)
  off = {**plain, "scale": jnp.zeros((L, B))}
  np.testing.assert_allclose(predict(trainable, off), untouched, **close)
  # And neither holds for the wrong reason: S+ is seen at the start, visual attention afterwards.
  differ = lambda y: np.abs(np.asarray(y) - untouched).max(axis=(1, 2, 3)).min()  # noqa: E731
  assert differ(predict(start, x)) > 1e-4
  assert differ(predict(trainable, plain)) > 1e-3
  # One sample's scale, one layer's scale.
  mixed = predict(trainable, {**plain, "scale": jnp.ones((L, B)).at[:, 0].set(0)})
  np.testing.assert_allclose(mixed[0], untouched[0], **close)
  assert np.abs(mixed[1] - untouched[1]).max() > 1e-3
  one = predict(trainable, {**plain, "scale": jnp.zeros((L, B)).at[2].set(1)})
  assert differ(one) > 1e-4 and differ(one - predict(trainable, plain) + untouched) > 1e-4


def test_every_trainable_tensor_learns(variant, x):
  """Finite gradients, zero for none, as soon as the gates are open."""
  name, graphdef, trainable, frozen = variant
  gradients = names(step(graphdef, trainable, frozen, x)[1])
  assert gradients.keys() == names(trainable).keys()
  for tensor, gradient in gradients.items():
    assert np.isfinite(gradient).all(), tensor
    assert np.abs(gradient).max() > 0, tensor
  dropped = {**x, "use_image": jnp.zeros(B, bool)}
  for tensor, gradient in names(step(graphdef, trainable, frozen, dropped)[1]).items():
    # A zero image must not blow up gradients through a norm of its constant features.
    assert np.linalg.norm(gradient) < 100 * (1 + np.linalg.norm(gradients[tensor])), tensor
  # At the start a = 0 hides what only the visual attention uses: its W'_k and W'_v, TV Fusion, the
  # Visual-Qformer (CSCL reaches that one), and the location map but where the map also scales
  # text ('shared': its last layer). The gates themselves and S+ learn from the first step on.
  start = names(step(graphdef, at_start(trainable), frozen, x)[1])
  silent = {tensor for tensor, gradient in start.items() if not np.abs(gradient).max() > 0}
  hidden = r"mfi_encoder\.(visual|fusion)\.|\.to_[kv]_visual\.|\.location\."
  expected = {tensor for tensor in start if re.search(hidden, tensor)}
  if name == "shared":
    expected = {tensor for tensor in expected if ".location.out." not in tensor}
  assert silent == expected


def test_trainable_is_the_adapter_and_frozen_the_base(default):
  _, trainable, frozen = default
  block = r"attentions\.\d+\.transformer_blocks\.\d+\.attn2"
  location = r"location\.(time\.kernel|(hidden|out)\.(kernel|bias))"
  allowed = re.compile(
    r"mfi_encoder\..*|unet\.(down_blocks\.0|mid_block|up_blocks\.0)\."
    rf"{block}\.(gate|to_[kv]_visual\.kernel|{location})"
  )
  adapter = names(trainable)
  assert [name for name in adapter if not allowed.fullmatch(name)] == []
  assert sum(name.endswith(".gate") for name in adapter) == L
  unwrapped = {name.replace("attn2.attn.", "attn2.") for name in names(frozen)}
  assert unwrapped == names(default_parts()[1]).keys()


def test_constructor_starts_from_the_base():
  """The real initialisation, of one model: gates and last layers zero, W' = W, the base kept."""
  definition, state = default_parts()
  state, made = filled(state), {}

  @jax.jit
  def build(state):
    model = CustomContrast(nnx.merge(definition, state).base(), *configs(), rngs=nnx.Rngs(1))
    made["layers"] = model.layer_paths
    return nnx.state(model)

  with jax.default_prng_impl("unsafe_rbg"):  # compiles in a third of the time
    after = names(build(state))
  for name, value in names(state).items():
    name = re.sub(r"attn2\.(to_)", r"attn2.attn.\1", name)
    np.testing.assert_array_equal(after[name], value)
  assert len(made["layers"]) == L
  for path in made["layers"]:
    layer = f"unet.{path}.attn2."
    assert after[layer + "gate"] == 0
    assert not np.any(after[layer + "location.out.kernel"])
    assert not np.any(after[layer + "location.out.bias"])
    for kind in "kv":
      mine, frozen = f"to_{kind}_visual.kernel", f"attn.to_{kind}.kernel"
      np.testing.assert_array_equal(after[layer + mine], after[layer + frozen])


def test_a_dropped_image_is_zeros_and_a_plain_prompt(default, x):
  graphdef, trainable, frozen = default
  half = {**x, "use_image": jnp.asarray([False, True])}
  (_, (one, _, conditioning)), _ = step(graphdef, trainable, frozen, half)
  other = step(graphdef, trainable, frozen, {**half, "pixels": x["pixels"][::-1]})[0][1][0]
  np.testing.assert_array_equal(one[0], other[0])
  assert np.abs(one[1] - other[1]).max() > 1e-3
  # The short cut for a whole batch without image says the same, without the L-fold text batch.
  without = jax.jit(
    lambda a, b: nnx.merge(graphdef, a, b).condition(None, x["ids"], None, None, x["t"])
  )(trainable, frozen)
  for layer, expected in zip(conditioning.context, without.context):
    np.testing.assert_allclose(layer.text[0], expected.text[0], atol=1e-5)
    np.testing.assert_allclose(layer.visual[0], expected.visual[0], atol=1e-5)
    assert np.abs(layer.text[1] - expected.text[1]).max() > 1e-3
  np.testing.assert_allclose(conditioning.text, without.text, atol=1e-5)  # S+ is not in the pooled
  both = Conditioning.concatenate([without, conditioning])
  assert both.textual_tokens.shape == (L, 2 * B, 3, WIDTH)
  np.testing.assert_array_equal(both.textual_tokens[:, B:], conditioning.textual_tokens)
  np.testing.assert_array_equal(both.context[1].visual[:B], without.context[1].visual)


def test_each_layer_sees_its_own_s_plus_and_tokens(default, x):
  """Text is what the frozen encoder makes of the list insert, layer by layer; so with TV Fusion."""
  graphdef, trainable, frozen = default
  (_, (_, _, conditioning)), _ = step(graphdef, trainable, frozen, x)
  model = nnx.merge(graphdef, trainable, frozen)
  tower, tokens = model.text_encoders[0], conditioning.textual_tokens
  embeddings = np.asarray(tower.token_embedding(x["ids"]))
  sequences = []
  for layer in range(L):
    for b in range(B):
      start, end = x["span"][b]
      norm = np.mean([np.linalg.norm(row) for row in embeddings[b, start:end]])
      rows = list(embeddings[b])
      for w in range(2):
        head = model.mfi_encoder.heads[0]
        word = np.asarray(tokens[layer, b, w] @ head.kernel[...] + head.bias[...])
        rows.insert(int(x["slot"][b]) + w, word * norm / np.linalg.norm(word))
      sequences.append(rows[:T])
  pool = jnp.tile(x["ids"], (L, 1))
  encode = jax.jit(lambda e, ids: tower(inputs_embeds=e, pool_ids=ids).last_hidden_state)
  expected = encode(jnp.asarray(sequences), pool).reshape(L, B, T, WIDTH)
  for layer in range(L):
    np.testing.assert_allclose(conditioning.context[layer].text, expected[layer], atol=1e-5)
  assert np.abs(expected[0] - expected[1]).max() > 1e-2
  see = jax.jit(lambda pixels: model.visual(model.image_features(pixels)[0])[1])
  fused = model.mfi_encoder.fusion(tokens, see(x["pixels"]))
  for layer in range(L):
    np.testing.assert_allclose(conditioning.context[layer].visual, fused[layer], atol=1e-5)
  assert np.abs(fused[0] - fused[1]).max() > 1e-2
  plain = encode(jnp.tile(embeddings, (L, 1, 1)), pool)[:B]
  np.testing.assert_allclose(conditioning.text, plain, atol=1e-5)


def test_groups_shared_words_and_pooling(x):
  """What the switches promise, read off the conditioning."""
  seen = {}
  for name in ("visual_only", "shared"):
    graphdef, trainable, frozen = split(**FORMS[name])
    seen[name] = step(graphdef, trainable, frozen, x)[0][1]
  same = lambda a, b: np.array_equal(np.asarray(a), np.asarray(b))  # noqa: E731

  _, maps, c = seen["visual_only"]  # one S+ for all, no (t, l), no map
  assert maps == () and c.textual_tokens.shape == (L, B, 3, 8)
  assert all(same(tokens, c.textual_tokens[0]) for tokens in c.textual_tokens)
  assert all(same(layer.text, c.context[0].text) for layer in c.context)

  _, maps, c = seen["shared"]  # groups (1, 3), no fusion, pooled text with S+
  assert c.textual_tokens.shape == (2, B, 3, WIDTH) and len(maps) == L
  assert not same(c.context[0].text, c.context[1].text)
  assert same(c.context[1].text, c.context[2].text) and same(c.context[1].text, c.context[3].text)
  assert all(same(layer.visual, c.context[0].visual) for layer in c.context)
  mean = (np.asarray(c.context[0].text) + c.context[1].text) / 2  # over groups
  np.testing.assert_allclose(c.text, mean, atol=1e-5)
  model = nnx.merge(graphdef, trainable, frozen)
  for cls_from, holds in (("last", True), ("mean", False)):  # what they are: the parts' tests
    model.mfi_encoder.textual.cls_from = cls_from
    encode = jax.jit(lambda pixels: model.encode(model.image_features(pixels)[0], x["t"]))
    assert np.allclose(c.textual_cls, encode(x["pixels"]).textual_cls, atol=1e-5) == holds


def test_maps_and_visual_tokens_of_a_whole_trajectory(default, x):
  """In a scan with a model from outside: maps come out, the Visual-Qformer ran once before."""
  graphdef, trainable, frozen = default

  @jax.jit
  def trajectory(trainable, frozen):
    model = nnx.merge(graphdef, trainable, frozen)
    features, _ = model.image_features(x["pixels"])
    visual = model.visual(features)

    def body(latents, t):
      c = model.condition(
        features, x["ids"], x["slot"], x["span"], jnp.full(B, t), visual=visual
      )
      prediction, maps = model.predict(latents, jnp.full(B, t), c, maps=True)
      return latents, (prediction, maps)

    return jax.lax.scan(body, x["latents"], jnp.asarray([20, 700]))[1]

  predictions, maps = trajectory(trainable, frozen)
  (_, (prediction, expected, _)), _ = step(graphdef, trainable, frozen, x)
  for b in range(B):  # sample b's own t is that of step b
    np.testing.assert_allclose(predictions[b, b], prediction[b], atol=1e-5)
    for layer in range(L):
      np.testing.assert_allclose(maps[layer][b, b], expected[layer][b], atol=1e-5)
  assert len(maps) == L and maps[0].shape == (2, B, 16, 1)
  assert 0 < np.min(maps[0]) < np.max(maps[0]) < 1


def test_image_features(default, x):
  graphdef, trainable, frozen = default
  model = nnx.merge(graphdef, trainable, frozen)
  get = jax.jit(lambda pixels: model.image_features(pixels))
  features, embed = get(x["pixels"])
  pixels = (x["pixels"] - jnp.asarray([0.5, 0.4, 0.3])) / jnp.asarray([0.3, 0.3, 0.2])
  out = jax.jit(lambda pixels: model.image_encoder(pixels))(pixels)
  expected = []
  for state in (out.hidden_states[1], out.hidden_states[2]):
    state = np.asarray(state, np.float64)
    centred = state - state.mean(-1, keepdims=True)
    expected.append(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5))
  np.testing.assert_allclose(features, np.concatenate(expected, axis=-1), atol=1e-4)
  np.testing.assert_allclose(embed, out.image_embeds, atol=1e-5)
  color = jnp.rint(x["pixels"][:, :1, :1] * 255) / 255  # resizing rounds to bytes
  big = jnp.repeat(jnp.repeat(color, 20, axis=1), 20, axis=2)
  small = jnp.repeat(jnp.repeat(color, 8, axis=1), 8, axis=2)
  np.testing.assert_allclose(get(big)[0], get(small)[0], atol=1e-3)


def test_two_text_encoders(x):
  """SDXL's way: penultimate states side by side, a head each, pooled from the plain prompt."""
  second = dict(TEXT, hidden_size=8, num_hidden_layers=2, projection_dim=6,
                architectures=["CLIPTextModelWithProjection"])
  unet = dict(UNET, cross_attention_dim=WIDTH + 8, addition_embed_type="text_time",
              addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 + 24)
  texts = (dict(TEXT, num_hidden_layers=2), second)
  parts = nnx.split(abstract(lambda rngs: Parts(unet, texts, VISION, rngs=rngs)))
  graphdef, trainable, frozen = split(parts)
  ids = (x["ids"], jnp.where(jnp.arange(T) > 7, 0, x["ids"]))  # its tokenizer pads with 0
  time_ids = jnp.asarray([[64.0, 64, 0, 0, 64, 64]] * B)

  @jax.jit
  def both(trainable, frozen):
    model = nnx.merge(graphdef, trainable, frozen)
    features, _ = model.image_features(x["pixels"])
    c = model.condition(features, ids, x["slot"], x["span"], x["t"], time_ids=time_ids)
    return c, [tower(i) for tower, i in zip(model.text_encoders, ids)]

  c, plain = both(trainable, frozen)
  expected = np.concatenate([out.hidden_states[-2] for out in plain], axis=-1)
  np.testing.assert_allclose(c.text_embeds, plain[1].pooled, atol=1e-5)
  for b in range(B):  # causal: up to the slot each layer sees the plain prompt
    slot = int(x["slot"][b])
    for layer in c.context:
      np.testing.assert_allclose(layer.text[b, :slot], expected[b, :slot], atol=1e-5)
      for part in (slice(0, WIDTH), slice(WIDTH, None)):  # S+ reached both encoders
        assert np.abs(layer.text[b, slot, part] - expected[b, slot, part]).max() > 1e-2
  assert c.text is None
  predict = lambda *s: nnx.merge(graphdef, *s).predict(x["latents"], x["t"], c)  # noqa: E731
  assert jax.eval_shape(predict, trainable, frozen).shape == x["latents"].shape


def test_scale_means_layers_or_samples():
  expected = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
  np.testing.assert_array_equal(scale_per_layer([1.0, 2.0, 3.0], 3, 2), expected)
  np.testing.assert_array_equal(scale_per_layer([4.0, 5.0], 3, 2), [[4, 5]] * 3)
  np.testing.assert_array_equal(scale_per_layer(0.5, 3, 2), np.full((3, 2), 0.5))
  np.testing.assert_array_equal(scale_per_layer([[1.0], [2.0]], 2, 2), [[1, 1], [2, 2]])
  with pytest.raises(UserError, match=r"give it as \[L, 1\] or \[1, B\]"):
    scale_per_layer([1.0, 2.0], 2, 2)
  with pytest.raises(UserError, match=r"shape \(5,\); use one number, 3 .layers. or 2 .samples."):
    scale_per_layer([1.0] * 5, 3, 2)


def test_users_mistakes(default, x):
  with pytest.raises(UserError, match="hidden state 3; the image encoder has 3, 0 .* to 2"):
    split(image_layers=(1, 3))
  with pytest.raises(UserError, match="layer_groups .* add up to the UNet's 4"):
    split(layer_groups=(2, 3))
  with pytest.raises(UserError, match="no image_encoder/; set config.encoder.image_encoder"):
    CustomContrast(types.SimpleNamespace(image_encoder=None), *configs(), rngs=nnx.Rngs(0))
  model = nnx.merge(*default)
  long = x["ids"].at[0, 6:9].set(3)
  features = jnp.zeros((B, 5, 20))
  with pytest.raises(UserError, match="10 tokens with 2 S\\+ words exceeds .* 11; shorten it by 1"):
    model.condition(features, long, x["slot"], x["span"], x["t"])
  tensors = adapter_tensors(model)
  tensors["unet.mid_block.gate"] = tensors.pop("mfi_encoder.visual.queries")
  with pytest.raises(UserError, match="missing mfi_encoder.visual.queries; unknown unet.mid_block"):
    apply_adapter(model, tensors)


def test_half_precision_base(x):
  """A bf16 base under an fp32-stored adapter that computes in bf16: dtypes, and a sane value."""
  model = abstract(
    lambda rngs: CustomContrast(
      Parts(UNET, (TEXT,), VISION, jnp.bfloat16, rngs=rngs).base(), *configs(),
      dtype=jnp.bfloat16, rngs=rngs,
    )
  )
  graphdef, trainable, frozen = nnx.split(model, is_trainable, ...)
  assert {v.dtype.name for v in names(trainable).values()} == {"float32"}
  assert {v.dtype.name for v in names(frozen).values()} == {"bfloat16"}
  out = jax.eval_shape(lambda a, b: run(graphdef, a, b, x), trainable, frozen)[1]
  assert out[0].dtype == jnp.bfloat16 and out[2].context[0].visual.dtype == jnp.bfloat16


class Tower(ImageEncoder):
  """Stands for an encoder of which only the config matters."""

  def __init__(self, **config):
    self.config = types.SimpleNamespace(**config)


def test_size_on_stable_diffusion_15():
  """Abstract, on the full-size UNet: L = 16, and the adapter within 120 M parameters."""
  config = sd15.get_config()
  parts = (
    MFIEncoderConfig.from_config(config.encoder),
    InjectionConfig.from_config(config.injection),
  )

  def build(rngs):
    unet = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    base = types.SimpleNamespace(
      unet=UNet2DCondition(UNetConfig.from_dict(unet), rngs=rngs),
      vae=None,
      text_encoders=(Tower(hidden_size=768),),
      image_encoder=Tower(hidden_size=1280, num_hidden_layers=32, image_size=224, patch_size=14),
      image_processor=dict(mean=(0.5,) * 3, std=(0.3,) * 3, size=224),
      force_zeros_for_empty_prompt=False,
    )
    return CustomContrast(base, *parts, rngs=rngs)

  model = abstract(build)
  assert len(model.layer_paths) == 16 and model.image_tokens == 257
  _, trainable, frozen = nnx.split(model, is_trainable, ...)
  count = lambda state: sum(int(np.prod(v.shape)) for v in names(state).values())  # noqa: E731
  assert count(frozen) == 859_520_964  # diffusers' UNet

  d, c = 768, 4 * 1280
  block = 12 * d * d + 4 * d  # q, k, v, out, an MLP of 4, two norms
  qformer = 17 * d + (c * d + d) + 4 * block + 2 * d  # queries, input projection, ..., last norm
  time_layer = (24 * d + d) + (d * d + d)
  encoder = 2 * qformer + time_layer + 2 * d * d + (d * d + d)  # ..., TV Fusion, the words' head
  widths = 5 * 320 + 5 * 640 + 6 * 1280  # of the 16 cross-attentions
  location = widths * 64 + 16 * (64 + 1280 * 64 + 64 + 1)
  expected = encoder + 2 * widths * d + location + 16
  assert count(trainable) == expected == 88_203_552
  assert count(trainable) <= 120_000_000


def test_options_of_parameters_are_those_of_their_names(default):
  """What modules declare, against the rule by names that the first runs were trained with."""
  _, trainable, frozen = default
  train = subjects3d.get_config().train
  params = names(trainable)
  mask = optimizer.decay_mask(params)
  assert list(mask) == list(params)
  for path, value in params.items():
    last = path.rsplit(".", 1)[-1]
    assert mask[path] == (value.ndim >= 2 and last not in ("bias", "scale", "gate")), path
    rate = param_options(path.split(".")).rate
    assert (train[rate] if rate else 1.0) == (train.gate_lr_mult if last == "gate" else 1.0), path
  words = ("to_k_visual", "to_v_visual", "location", "gate")
  for path in (*params, *names(frozen)):
    parts = path.split(".")
    behind = parts[parts.index("attn2") + 1 :] if "attn2" in parts else ()
    by_name = parts[0] == "mfi_encoder" or any(word in behind for word in words)
    assert is_trainable(parts) == (path in params) == by_name, path
