"""The method's parts against naive numpy: Q-Formers, TV Fusion, S+, injection, the adapter file."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from cc_jax.customcontrast import adapter_file, s_plus
from cc_jax.customcontrast.injection import InjectedCrossAttention, InjectionConfig, LayerCondition
from cc_jax.customcontrast.mfi_encoder import MFIEncoderConfig
from cc_jax.customcontrast.qformer import TextualQformer, fourier, perceiver_attention
from cc_jax.customcontrast.tv_fusion import TVFusion
from cc_jax.errors import UserError
from cc_jax.models.attention import Attention
from cc_jax.models.rngs import StatelessRngs
from configs import sd15, sd21, sdxl, subjects3d

RNG = np.random.default_rng(0)
KINDS = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def attention(q, k, v):
  """One head, one sample, one query at a time."""
  return np.stack([softmax(k @ row / math.sqrt(q.shape[-1])) @ v for row in q])


# Q-Formers and TV Fusion ------------------------------------------------------------------------


def test_perceiver_attention_is_attention_over_image_and_queries():
  q, k_self, v_self = draw(2, 3, 4, 2, 5), draw(2, 3, 4, 2, 5), draw(2, 3, 4, 2, 5)
  k_image, v_image = draw(2, 6, 2, 5), draw(2, 6, 2, 5)
  out = perceiver_attention(q, k_image, v_image, k_self, v_self)
  for n, b, h in np.ndindex(3, 2, 2):
    keys = np.concatenate([k_image[b, :, h], k_self[b, n, :, h]])
    values = np.concatenate([v_image[b, :, h], v_self[b, n, :, h]])
    expected = attention(q[b, n, :, h], keys, values)
    np.testing.assert_allclose(out[b, n, :, h], expected, atol=1e-5)


def relative_error(found, wanted):
  return np.linalg.norm(np.float64(found) - wanted) / np.linalg.norm(wanted)


def test_logits_are_not_rounded_to_bfloat16():  # C14
  """In bfloat16 the attention errs no more than JAX's own, which keeps its logits in float32."""
  rng = np.random.default_rng(1)  # its own: others' draws stay as they were
  half = lambda *shape: jnp.asarray(3 * rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
  q, k, v = half(2, 1, 8, 4, 64), half(2, 40, 4, 64), half(2, 40, 4, 64)
  nothing, only = jnp.zeros((2, 1, 0, 4, 64), jnp.bfloat16), q[:, 0]
  wanted = np.stack([
    np.stack([attention(*(np.float64(x[b, :, h]) for x in (only, k, v))) for h in range(4)], axis=1)
    for b in range(2)
  ])  # fmt: skip
  peer = relative_error(jax.nn.dot_product_attention(only, k, v), wanted)
  found = relative_error(perceiver_attention(q, k, v, nothing, nothing)[:, 0], wanted)
  assert found < 1.2 * peer, (found, peer)

  fusion = TVFusion(64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  textual, visual = half(1, 2, 8, 64), half(2, 40, 64)
  for head in (fusion.to_q, fusion.to_k):
    head.kernel[...] = jnp.eye(64, dtype=jnp.bfloat16)
  wanted = np.stack([attention(*(np.float64(x) for x in (textual[0, b], visual[b], visual[b])))
                     for b in range(2)])  # fmt: skip
  one_head = [x[:, :, None] for x in (textual[0], visual, visual)]
  peer = relative_error(jax.nn.dot_product_attention(*one_head)[:, :, 0], wanted)
  found = relative_error(fusion(textual, visual)[0], wanted)
  assert found < 1.2 * peer, (found, peer)


def test_tv_fusion_is_the_formula():
  fusion = TVFusion(6, rngs=nnx.Rngs(0))
  textual, visual = draw(3, 2, 4, 6), draw(2, 5, 6)
  out = fusion(textual, visual)
  w_q, w_k = np.asarray(fusion.to_q.kernel[...]), np.asarray(fusion.to_k.kernel[...])
  for n, b, q in np.ndindex(3, 2, 4):
    logits = [(textual[n, b, q] @ w_q) @ (v @ w_k) / math.sqrt(6) for v in visual[b]]
    expected = sum(a * v for a, v in zip(softmax(np.array(logits)), visual[b]))
    np.testing.assert_allclose(out[n, b, q], expected, atol=1e-5)


def test_fourier_features():
  x = fourier(jnp.asarray([0.0, 0.25]), 2)
  np.testing.assert_allclose(x[0], [0, 0, 0, 1, 1], atol=1e-6)
  half = math.sqrt(0.5)
  np.testing.assert_allclose(x[1], [0.25, half, 1, half, 0], atol=1e-6)


@pytest.fixture(scope="module")
def textual():
  return TextualQformer(7, 8, depth=2, heads=2, queries=3, layers=4, rngs=nnx.Rngs(1))


def test_textual_tokens_of_all_layers_equal_a_loop_over_layers(textual):
  features, t = jnp.asarray(draw(2, 5, 7)), jnp.asarray([10, 900])
  cls, tokens = jax.jit(textual)(features, t)

  @jax.jit
  def one_layer(layer):
    ft, fl = fourier(t / 1000, 6), fourier(jnp.full((2,), layer / 3), 5)
    hidden = jax.nn.silu(textual.mlp_in(jnp.concatenate([ft, fl], axis=-1)))
    x = (textual.queries[...] + textual.mlp_out(hidden)[:, None])[:, None]
    for block in textual.blocks:
      x = block(x, textual.proj_in(features))
    return textual.norm_out(x)[:, 0]

  expected = np.stack([one_layer(layer) for layer in range(4)])
  np.testing.assert_allclose(tokens, expected[:, :, 1:], atol=1e-5)
  np.testing.assert_allclose(cls, expected[:, :, 0].mean(axis=0), atol=1e-5)
  textual.cls_from = "last"  # a new function, since jit would remember the old one
  cls, _ = jax.jit(lambda features, t: textual(features, t))(features, t)
  np.testing.assert_allclose(cls, expected[-1, :, 0], atol=1e-5)
  textual.cls_from = "mean"


def test_textual_tokens_know_t_and_l(textual):
  features = jnp.asarray(np.broadcast_to(draw(1, 5, 7), (2, 5, 7)))
  tokens = np.asarray(jax.jit(textual)(features, jnp.asarray([10, 900]))[1])
  assert np.abs(tokens[:, 0] - tokens[:, 1]).max(axis=(1, 2)).min() > 0.01
  for other in range(1, 4):
    assert np.abs(tokens[0] - tokens[other]).max() > 0.01


# S+ ---------------------------------------------------------------------------------------------

BOS, EOS = 90, 99


def prompt(words, length):
  """Token ids: BOS, words 1, 2, ..., EOS, padding (which is EOS too, as in SD 1.5)."""
  return [BOS, *range(1, words + 1), EOS] + [EOS] * (length - words - 2)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_insertion_equals_a_list_insert(count):
  """Slots after the first, a middle and the last word; room, just enough room, too little of it."""
  length = 12
  cases = [(n, slot) for n in (3, 10 - count, 12 - 2) for slot in (1, 2, n + 1)]
  cases = [(n, slot, use) for n, slot in cases for use in (True, False)]
  table, words = draw(100, 4), draw(2, len(cases), count, 4)
  ids = np.array([prompt(n, length) for n, _, _ in cases])
  slot, use = np.array([c[1] for c in cases]), np.array([c[2] for c in cases])
  eos = np.array([n + 1 for n, _, _ in cases])
  out = jax.jit(s_plus.insert_words)(jnp.asarray(table)[ids], words, slot, eos, use)
  out_ids = np.asarray(s_plus.insert_ids(jnp.asarray(ids), count, slot, eos, use))
  for i, (n, at, used) in enumerate(cases):
    for s in range(2):
      rows = list(table[ids[i]])
      names = list(ids[i])
      if used:
        for w in range(count):
          rows.insert(at + w, words[s, i, w])
          names.insert(at + w, ids[i, at - 1])
      if used and n + 2 + count > length:  # EOS is behind the limit: it takes the last place
        rows[length - 1], names[length - 1] = table[EOS], EOS
      np.testing.assert_array_equal(out[s, i], np.stack(rows[:length]))
      assert out_ids[i].tolist() == names[:length]
    first_eos = out_ids[i].tolist().index(EOS)
    assert first_eos == min(n + 1 + (count if used else 0), length - 1)


def test_no_room_for_s_plus_is_a_users_error():
  ids = np.array([prompt(8, 12)])
  s_plus.check_room(ids, np.array([9]), 2)  # EOS lands on the last index, 11
  with pytest.raises(UserError, match="10 tokens with 3 S\\+ words exceeds .* 12; .* by 1 token"):
    s_plus.check_room(ids, np.array([9]), 3)


def test_words_get_the_mean_norm_of_the_nouns_tokens():
  embeddings = np.zeros((3, 4, 2), np.float32)
  embeddings[:, 1] = [3, 4]  # norm 5
  embeddings[:, 2] = [0, 1]
  span = jnp.asarray([[1, 2], [1, 3], [2, 2]])  # one token, two tokens, unknown: the one before
  norm = s_plus.noun_norm(jnp.asarray(embeddings), span)
  np.testing.assert_allclose(norm, [5, 3, 5], rtol=1e-6)
  words = s_plus.set_norm(jnp.asarray(draw(2, 3, 2, 2)), norm)
  lengths = np.linalg.norm(words, axis=-1)
  np.testing.assert_allclose(lengths, np.broadcast_to([[5], [3], [5]], (2, 3, 2)), rtol=1e-5)
  direction = draw(1, 3, 1, 2)
  kept = s_plus.set_norm(jnp.asarray(direction), norm)
  np.testing.assert_allclose(np.cross(kept, direction), 0, atol=1e-4)


# Injection --------------------------------------------------------------------------------------


def layer(form="complementary", *, width=6, **config):
  """A cross-attention of 8 channels and 2 heads on text of 6, injected, with everything random."""
  attn = Attention(8, heads=2, context_width=6, rngs=nnx.Rngs(0), **KINDS)
  config = InjectionConfig(form=form, location_width=5, **config)
  sizes = dict(visual_width=width, temb_width=7)
  return InjectedCrossAttention(attn, config, **sizes, **KINDS, rngs=nnx.Rngs(1))


def randomise(module):
  module.gate[...] = jnp.asarray(0.7)
  if hasattr(module, "location"):
    module.location.out.kernel[...] = jnp.asarray(draw(5, 1)) * 3


def by_hand(module, form, hidden, text, visual, temb, scale, k_visual, v_visual):
  """The written formula, sample by sample, head by head, in numpy."""
  w = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))
  out = []
  for b in range(len(hidden)):
    q = hidden[b] @ w["attn"]["to_q"]["kernel"]
    k, v = (text[b] @ w["attn"][name]["kernel"] for name in ("to_k", "to_v"))
    heads = [slice(0, 4), slice(4, 8)]
    text_out = np.concatenate([attention(q[:, h], k[:, h], v[:, h]) for h in heads], axis=1)
    k, v = visual[b] @ k_visual, visual[b] @ v_visual
    visual_out = np.concatenate([attention(q[:, h], k[:, h], v[:, h]) for h in heads], axis=1)
    a, s, g = float(w["gate"]), float(scale[b]), min(float(scale[b]), 1.0)
    m = None
    if "location" in w:
      p = w["location"]
      silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
      x = hidden[b] @ p["hidden"]["kernel"] + p["hidden"]["bias"]
      x = silu(x + silu(temb[b]) @ p["time"]["kernel"])
      m = 1 / (1 + np.exp(-(x @ p["out"]["kernel"] + p["out"]["bias"])))
    if form == "shared":
      mixed = text_out + s * a * visual_out
      merged = mixed if m is None else (1 + g * (2 * m - 1)) * mixed
    else:
      m = 1.0 if m is None else m
      keep = 1 - g * a * m if form == "complementary" else 1.0
      merged = keep * text_out + s * a * m * visual_out
    to_out = w["attn"]["to_out"][0]
    out.append(merged @ to_out["kernel"] + to_out["bias"])
  return np.stack(out)


@pytest.mark.parametrize("form", ["complementary", "visual_only", "shared"])
@pytest.mark.parametrize("location", [True, False])
def test_injection_is_the_written_formula(form, location):
  module = layer(form, location=location)
  randomise(module)
  hidden, text, visual, temb = draw(3, 4, 8), draw(3, 5, 6), draw(3, 2, 6), draw(3, 7)
  scale = np.array([0.0, 0.6, 1.7], np.float32)
  out = module(jnp.asarray(hidden), LayerCondition(text, visual, jnp.asarray(scale)), temb)
  k, v = np.asarray(module.to_k_visual.kernel[...]), np.asarray(module.to_v_visual.kernel[...])
  expected = by_hand(module, form, hidden, text, visual, temb, scale, k, v)
  np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("width", [6, 4])
def test_low_rank_projections(width):
  """W_k + down·up where widths agree (up = 0 at the start), down·up alone where they do not."""
  module = layer(low_rank=2, width=width)
  up = module.to_k_visual.up.kernel[...]
  assert bool(jnp.all(up == 0)) == (width == 6)
  randomise(module)
  matrices = []
  for name, low in (("to_k", module.to_k_visual), ("to_v", module.to_v_visual)):
    low.up.kernel[...] = jnp.asarray(draw(2, 8))
    product = np.asarray(low.down.kernel[...]) @ np.asarray(low.up.kernel[...])
    frozen = np.asarray(getattr(module.attn, name).kernel[...])
    matrices.append(product + frozen if width == 6 else product)
  hidden, text, visual, temb = draw(2, 4, 8), draw(2, 5, 6), draw(2, 3, width), draw(2, 7)
  scale = np.ones(2, np.float32)
  out = module(jnp.asarray(hidden), LayerCondition(text, visual, jnp.asarray(scale)), temb)
  args = (hidden, text, visual, temb, scale, *matrices)
  np.testing.assert_allclose(out, by_hand(module, "complementary", *args), atol=1e-5)


def test_injection_starts_from_the_frozen_layer():
  module = layer()
  for mine, theirs in (("to_k_visual", "to_k"), ("to_v_visual", "to_v")):
    copy, frozen = getattr(module, mine).kernel[...], getattr(module.attn, theirs).kernel[...]
    np.testing.assert_array_equal(copy, frozen)
    # Not the same buffer: donating the trainable one must leave the frozen one alive.
    assert copy.unsafe_buffer_pointer() != frozen.unsafe_buffer_pointer()
  assert module.gate[...] == 0
  narrow = layer(width=4).to_k_visual.kernel[...]
  assert narrow.shape == (4, 8) and 0.2 < float(jnp.std(narrow)) < 0.8  # lecun: 1/√4
  hidden, text, temb = jnp.asarray(draw(2, 4, 8)), jnp.asarray(draw(2, 5, 6)), draw(2, 7)
  condition = LayerCondition(text, jnp.asarray(draw(2, 3, 6)), jnp.ones(2), record=True)
  np.testing.assert_array_equal(module(hidden, condition, temb), module.attn(hidden, text))
  np.testing.assert_array_equal(module(hidden, text, temb), module.attn(hidden, text))
  np.testing.assert_array_equal(module.location_map.get_value()[0], np.full((2, 4, 1), 0.5))
  # IP-Adapter's start: no map, no gate, the text's own keys and values for the other tokens.
  ip = layer(form="visual_only", location=False, gate_start=1.0)
  plain, bias = ip.attn(hidden, text), ip.attn.to_out[0].bias[...]
  twice = ip(hidden, LayerCondition(text, text, jnp.ones(2)), temb)
  np.testing.assert_allclose(twice - bias, 2 * (plain - bias), atol=1e-5)


# Configs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("fusoin", "tv_fusion", r"config.encoder.fusoin is unknown; .*fusion"),
    ("fusion", "tv", r"fusion is 'tv'; use one of tv_fusion, visual_tokens"),
    ("timestep_layer", "fourier", "use one of fourier_mlp, none"),
    ("s_plus_space", "all", "use one of per_layer, shared"),
    ("width", "128", "must be of type int"),
    ("width", 130, "no multiple of config.encoder.heads 4"),
    ("depth", 0, "at least 1"),
    ("s_words", 9, "only 8 textual queries"),
    ("image_layers", (), "empty"),
    ("image_layers", ("1",), "tuple of integers"),
  ],
)
def test_encoder_config_is_strict(key, value, message):
  values = {**subjects3d.get_config().encoder.to_dict(), key: value}
  with pytest.raises(UserError, match=message):
    MFIEncoderConfig.from_config(values)


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("form", "both", "use one of complementary, visual_only, shared"),
    ("low_rank", -1, "0 for full rank"),
    ("location", 1, "must be of type bool"),
    ("location_width", 0, "location=False"),
    ("gate", 0.0, "unknown"),
  ],
)
def test_injection_config_is_strict(key, value, message):
  values = {**subjects3d.get_config().injection.to_dict(), key: value}
  with pytest.raises(UserError, match=message):
    InjectionConfig.from_config(values)


def test_missing_key_and_layer_groups():
  values = subjects3d.get_config().encoder.to_dict()
  values.pop("width")
  with pytest.raises(UserError, match="config.encoder.width is missing"):
    MFIEncoderConfig.from_config(values)
  values |= {"width": 128, "layer_groups": (1, 3)}
  config = MFIEncoderConfig.from_config(values)
  assert config.group_of_layer(4) == (0, 1, 1, 1)
  with pytest.raises(UserError, match="add up to the UNet's 5"):
    config.group_of_layer(5)


def test_every_config_of_the_package_is_read_whole():
  for module in (subjects3d, sd15, sd21, sdxl):
    config = module.get_config()
    encoder = MFIEncoderConfig.from_config(config.encoder)
    injection = InjectionConfig.from_config(config.injection)
    assert set(config.encoder) == set(encoder.__dataclass_fields__)
    assert set(config.injection) == set(injection.__dataclass_fields__)


# The adapter file -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
  encoder = MFIEncoderConfig.from_config(subjects3d.get_config().encoder)
  tensors = {"mfi_encoder.a.kernel": draw(3, 2), "unet.attn2.gate": np.float32(0.5)}
  path = tmp_path / "new" / "adapter.safetensors"
  about = dict(encoder=encoder, injection=InjectionConfig(), base_name="b", base_hash="abc" * 9)
  adapter_file.save_adapter(path, tensors, **about, notes={"steps": "7"})
  return path, tensors, about


def test_adapter_file_round_trip(saved):
  path, tensors, about = saved
  adapter = adapter_file.load_adapter(path)
  assert adapter.tensors.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(adapter.tensors[name], value)
    assert adapter.tensors[name].shape == value.shape
  assert adapter.encoder == about["encoder"] and adapter.injection == about["injection"]
  assert adapter.notes == {"steps": "7"} and adapter.base_name == "b"
  assert [p.name for p in path.parent.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapter_file_in_half_precision(saved, dtype):
  path, tensors, about = saved
  adapter_file.save_adapter(path, tensors, **about, dtype=dtype)
  read = adapter_file.load_adapter(path).tensors["mfi_encoder.a.kernel"]
  expected = jnp.asarray(tensors["mfi_encoder.a.kernel"], dtype)
  assert read.dtype == expected.dtype
  np.testing.assert_array_equal(read.astype(np.float32), np.asarray(expected, np.float32))


def test_adapter_file_errors(saved, tmp_path):
  path, tensors, about = saved
  with pytest.raises(UserError, match="no such adapter file"):
    adapter_file.load_adapter(tmp_path / "none.safetensors")
  with pytest.raises(UserError, match="a.kernel is not finite in float16"):
    huge = {**tensors, "mfi_encoder.a.kernel": np.full((1,), 1e6, np.float32)}
    adapter_file.save_adapter(path, huge, **about, dtype="float16")
  whole = path.read_bytes()
  for size in (0, 4, 60, len(whole) - 3):
    path.write_bytes(whole[:size])
    with pytest.raises(UserError, match="truncated or no safetensors file") as error:
      adapter_file.load_adapter(path)
    assert "\n" not in str(error.value)
  foreign = tmp_path / "ip_adapter.safetensors"
  safetensors.numpy.save_file({"ip_adapter.1.to_k_ip.weight": draw(2, 2)}, foreign)
  with pytest.raises(UserError, match="no CustomContrast adapter .*ip_adapter.1.to_k_ip.weight"):
    adapter_file.load_adapter(foreign)
  newer = whole.replace(b'"format_version":"1"', b'"format_version":"9"')
  assert newer != whole
  path.write_bytes(newer)
  with pytest.raises(UserError, match="adapter format 9, this version reads up to 1; update"):
    adapter_file.load_adapter(path)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write"):
    adapter_file.save_adapter(tmp_path / "file" / "a.safetensors", tensors, **about)


def test_apply_adapter_names_what_differs():
  class Model(nnx.Module):
    def __init__(self):
      self.mfi_encoder = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      self.unet = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

  model = Model()
  mine = adapter_file.adapter_tensors(model)
  assert sorted(mine) == ["mfi_encoder.bias", "mfi_encoder.kernel"]
  frozen = np.asarray(model.unet.kernel[...])
  new = {"mfi_encoder.kernel": draw(2, 3).astype(np.float16), "mfi_encoder.bias": draw(3)}
  adapter_file.apply_adapter(model, new)
  np.testing.assert_array_equal(model.mfi_encoder.kernel[...], new["mfi_encoder.kernel"])
  assert model.mfi_encoder.kernel[...].dtype == jnp.float32
  np.testing.assert_array_equal(model.unet.kernel[...], frozen)
  message = (
    r"a.st does not fit .* missing mfi_encoder.bias; unknown mfi_encoder.gain; "
    r"wrong shape: mfi_encoder.kernel \(9, 3\) instead of \(2, 3\)"
  )
  with pytest.raises(UserError, match=message):
    wrong = {"mfi_encoder.gain": draw(3), "mfi_encoder.kernel": draw(9, 3)}
    adapter_file.apply_adapter(model, wrong, source="a.st")


def test_keys_of_new_modules_are_folded_in_one_by_one():
  """Older adapters began from these numbers; a block of keys at once must not change them."""
  rngs, key = StatelessRngs(7), jax.random.key(7)
  keys = [rngs.params() for _ in range(515)]
  for number in (1, 2, 512, 513, 515):
    expected = jax.random.fold_in(key, number)
    np.testing.assert_array_equal(*map(jax.random.key_data, (keys[number - 1], expected)))
