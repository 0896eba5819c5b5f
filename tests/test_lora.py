"""LoRA and its relatives: whose file it is, how strong, and what it makes of a weight.

Pictures with LoRAs are in test_formats.py. No peft, LyCORIS or ComfyUI is installed here; the
numbers follow by hand from the rules that each test states, and the rules were compared with the
packages themselves: peft 0.21.2 (`merge_and_unload`, and `PeftModel.from_pretrained` for which key
of a pattern counts), diffusers 0.42.1 with it (`fuse_lora`), and LyCORIS 4.1.3 (`forward`).
"""

import json
import logging
import types

import numpy as np
import pytest
import safetensors.numpy
import torch

from cc_jax.bases import lora_files
from cc_jax.bases.lora_files import Lora, Merged, find_lora
from cc_jax.errors import UserError

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY, CONV = f"{BLOCK}.to_q", f"{BLOCK}.to_k", "mid_block.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {
  "unet": {f"{QUERY}.weight": (6, 4), f"{KEY}.weight": (6, 4), f"{CONV}.weight": (6, 4, 3, 3)},
  "text_encoder": {f"{TEXT}.weight": (6, 4)},
  "text_encoder_2": {f"{TEXT}.weight": (6, 4)},
}
ORIGINAL = {
  QUERY: "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
  KEY: "input_blocks.1.1.transformer_blocks.0.attn1.to_k",
  CONV: "middle_block.0.in_layers.2",
}
RNG = np.random.default_rng(0)
BASE = {
  component: {
    name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
  }
  for component, shapes in SHAPES.items()
}
A, B = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 4), (6, 2)))


def write(path, tensors, metadata=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
  safetensors.numpy.save_file(tensors, path, metadata)
  return path


def merged(lora):
  """component -> name -> weight, of those that the LoRA changes."""
  return {
    component: {
      name: Merged(BASE[component], {name: [(change, lora.scale)]})[name]
      for name, change in changes.items()
    }
    for component, changes in lora.resolve(SHAPES, ORIGINAL).items()
  }


def pair(module, prefix="base_model.model."):
  return {f"{prefix}{module}.lora_A.weight": A, f"{prefix}{module}.lora_B.weight": B}


# ---- how strong: PEFT's settings (P8)

TO_Q_FIRST = {"to_q": 6, r"down_blocks\..*": 10, "q": 3}
STRENGTHS = {  # settings -> strength of QUERY's change, whose rank is 2
  "alpha": ({"r": 2, "lora_alpha": 12}, 12 / 2),
  "default": ({"r": 2}, 8 / 2),
  "rslora": ({"r": 2, "lora_alpha": 12, "use_rslora": True}, 12 / 2**0.5),
  "first_match": ({"r": 2, "lora_alpha": 12, "alpha_pattern": TO_Q_FIRST}, 6 / 2),
  "regex": ({"r": 2, "lora_alpha": 12, "alpha_pattern": {r"down_blocks\..*_q": 10, "to_q": 6}}, 5),
  "whole_words": ({"r": 2, "lora_alpha": 12, "alpha_pattern": {"q": 3, "to": 3}}, 12 / 2),
  "rank": ({"r": 5, "rank_pattern": {"attn1.to_q": 2}, "lora_alpha": 12}, 12 / 2),
  "alternatives": ({"r": 2, "lora_alpha": 12, "alpha_pattern": {"to_k|to_q": 3}}, 3 / 2),
}


@pytest.mark.parametrize("where", ["beside", "header"])
@pytest.mark.parametrize("name", STRENGTHS)
def test_pefts_settings_say_how_strong(name, where, tmp_path):
  """P8: adapter_config.json beside adapter_model.safetensors, or diffusers' copy in the header.

  alpha / r, or alpha / sqrt(r); the first key counts that is a module's name or the end of it.
  """
  settings, strength = STRENGTHS[name]
  file = tmp_path / "adapter_model.safetensors"
  if where == "beside":
    write(file, pair(QUERY))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
  else:
    metadata = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    write(file, pair(QUERY, "unet."), {"lora_adapter_metadata": metadata})
  weight = f"{QUERY}.weight"
  expected = BASE["unet"][weight] + 0.5 * strength * (B @ A)
  np.testing.assert_allclose(merged(Lora(file, 0.5))["unet"][weight], expected, rtol=1e-5)


def test_alpha_patterns_of_text_encoders(tmp_path):
  """P8: PEFT sees transformers' names, which have `text_model.` in version 4 and not in 5."""
  for name in (TEXT, TEXT.removeprefix("text_model.")):
    file = write(tmp_path / "adapter_model.safetensors", pair(name))
    settings = {"r": 2, "lora_alpha": 2, "alpha_pattern": {f"^{name}": 10}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    weight = f"{TEXT}.weight"
    changed = merged(Lora(file))["text_encoder"][weight]
    np.testing.assert_allclose(changed - BASE["text_encoder"][weight], 5 * B @ A, rtol=1e-4)


def test_a_loras_folder(tmp_path, monkeypatch):
  """P8: as PEFT's and diffusers' save functions leave it, one network or several, or on the hub."""
  config = json.dumps({"r": 2, "lora_alpha": 4})
  for component, module in [("unet", QUERY), ("text_encoder_2", TEXT.removeprefix("text_model."))]:
    write(tmp_path / "both" / component / "adapter_model.safetensors", pair(module))
    (tmp_path / "both" / component / "adapter_config.json").write_text(config)
  both = merged(Lora(tmp_path / "both"))
  assert both.keys() == {"unet", "text_encoder_2"}
  for component, module in [("unet", QUERY), ("text_encoder_2", TEXT)]:
    weight = f"{module}.weight"
    difference = both[component][weight] - BASE[component][weight]
    np.testing.assert_allclose(difference, 2 * B @ A, rtol=1e-4, atol=1e-6)
  # Beside PEFT's file, another of the same LoRA is not a second one.
  write(tmp_path / "both" / "pytorch_lora_weights.safetensors", pair(QUERY, "unet."))
  assert merged(Lora(tmp_path / "both")).keys() == both.keys()
  write(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors", pair(QUERY, "unet."))
  assert merged(Lora(tmp_path / "diffusers")).keys() == {"unet"}
  first = Lora(tmp_path / "both").identity
  (tmp_path / "both" / "unet" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 5}')
  assert first != Lora(tmp_path / "both").identity  # of which a base's hash is made

  asked = []
  hub = types.SimpleNamespace(
    is_hub_id=lambda name: name.count("/") > 0,
    fetch_folder=lambda name, patterns: asked.append((name, patterns)) or tmp_path / "both",
    find_file=lambda name: tmp_path / "both" / "unet" / "adapter_model.safetensors",
  )
  monkeypatch.setattr(lora_files, "download", hub)
  assert find_lora("owner/lora@main") == tmp_path / "both"
  assert {"adapter_config.json", "unet/adapter_model.safetensors"} <= set(asked.pop()[1])
  find_lora("owner/lora/unet/adapter_model.safetensors@main")
  assert asked == [("owner/lora/unet@main", ("adapter_config.json",))]
  assert find_lora(tmp_path) == tmp_path / "both" / "unet" / "adapter_model.safetensors"


def test_a_peft_file_without_its_settings_is_told(tmp_path, caplog):
  """P8: nothing in it says how strong it is."""
  file = write(tmp_path / "renamed.safetensors", pair(QUERY))
  with caplog.at_level(logging.WARNING):
    lora = Lora(file)
  assert "renamed.safetensors: adapter_config.json is not beside it" in caplog.text
  weight = f"{QUERY}.weight"
  np.testing.assert_allclose(merged(lora)["unet"][weight], BASE["unet"][weight] + B @ A, rtol=1e-5)


# ---- whose module: names (P22)

SPELLINGS = {
  f"lora_unet_{QUERY.replace('.', '_')}": ("unet", QUERY),
  f"lora_unet_{ORIGINAL[CONV].replace('.', '_')}": ("unet", CONV),
  f"lycoris_{QUERY.replace('.', '_')}": ("unet", QUERY),
  f"diffusion_model.{ORIGINAL[QUERY]}": ("unet", QUERY),
  f"diffusion_model.{ORIGINAL[CONV]}": ("unet", CONV),
  f"model.diffusion_model.{ORIGINAL[QUERY]}": ("unet", QUERY),
  f"lora_te_{TEXT.replace('.', '_')}": ("text_encoder", TEXT),
  "lora_te1_encoder_layers_0_self_attn_q_proj": ("text_encoder", TEXT),
  "lora_te2_encoder_layers_0_self_attn_q_proj": ("text_encoder_2", TEXT),
  f"text_encoders.clip_l.transformer.{TEXT}": ("text_encoder", TEXT),
  f"text_encoders.clip_g.transformer.{TEXT}": ("text_encoder_2", TEXT),
  "text_encoder.encoder.layers.0.self_attn.q_proj": ("text_encoder", TEXT),
  "base_model.model.encoder.layers.0.self_attn.q_proj": ("text_encoder", TEXT),
  f"base_model.model.{QUERY}": ("unet", QUERY),
  f"base_model.model.unet.{QUERY}": ("unet", QUERY),
}


@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_modules(spelling, ends, tmp_path):
  """P22: ComfyUI's, diffusers' export to kohya's under transformers 5, and the others."""
  component, module = SPELLINGS[spelling]
  weight = f"{module}.weight"
  ups = {2: (A, B), 4: (RNG.standard_normal((2, 4, 3, 3)).astype(np.float32), B[..., None, None])}
  down, up = ups[len(SHAPES[component][weight])]
  tensors = {f"{spelling}.{end}.weight": factor for end, factor in zip(ends, (down, up))}
  tensors[f"{spelling}.alpha"] = np.array(1.0, np.float32)
  result = merged(Lora(write(tmp_path / "l.safetensors", tensors)))
  assert result.keys() == {component} and result[component].keys() == {weight}
  product = torch.einsum("or,r...->o...", torch.tensor(up).flatten(1), torch.tensor(down)).numpy()
  difference = result[component][weight] - BASE[component][weight]
  np.testing.assert_allclose(difference, 0.5 * product, rtol=1e-4, atol=1e-5)


# ---- what is made of a weight: LoHa, LoKr, DoRA (P22)


def normal(*shape):
  return torch.from_numpy(RNG.standard_normal(shape).astype(np.float32))


def rows(weight):
  """The norm of what makes one output."""
  return weight.flatten(1).norm(dim=1)


def columns(weight):
  return weight.transpose(0, 1).flatten(1).norm(dim=1)


def kinds(conv):
  """name -> (factors, W -> the changed W at a scale of 0.5), by the papers' formulas in torch."""
  shape = (6, 4, 3, 3) if conv else (6, 4)
  window, ones = shape[2:], (1,) * len(shape[2:])
  inputs = 36 if conv else 4
  a, b = normal(2, 4, *window), normal(6, 2, *ones)
  change = 1.5 * torch.einsum("or,r...->o...", b.flatten(1), a)  # alpha 3, rank 2
  w1a, w1b, w2a, w2b = normal(6, 2), normal(2, inputs), normal(6, 2), normal(2, inputs)
  k1, k2, k2a, k2b = normal(2, 2), normal(3, 2, *window), normal(3, 1), normal(1, inputs // 2)
  k1a, k1b = normal(2, 1), normal(1, 2)
  out, each = normal(6).abs() + 1, normal(4).abs() + 1
  alpha = {"alpha": torch.tensor(3.0)}
  lora = {"lora_down.weight": a, "lora_up.weight": b, **alpha}

  def dora(weight, norms, magnitude, axis):
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * (magnitude / norms(weight)).reshape(shape)

  loha = 1.5 * ((w1a @ w1b) * (w2a @ w2b)).reshape(shape)
  halves = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
  found = {
    "lora": (lora, lambda w: w + 0.5 * change),
    "loha": ({**halves, **alpha}, lambda w: w + 0.5 * loha),
    "lokr": (  # two whole factors: there is no rank, and alpha says nothing
      {"lokr_w1": k1, "lokr_w2": k2, "alpha": torch.tensor(3.0)},
      lambda w: w + 0.5 * torch.kron(k1.reshape(2, 2, *ones), k2),
    ),
    "lokr_one": (
      {"lokr_w1": k1, "lokr_w2_a": k2a, "lokr_w2_b": k2b, **alpha},
      lambda w: w + 0.5 * 3 * torch.kron(k1, k2a @ k2b).reshape(shape),
    ),
    "lokr_both": (
      {"lokr_w1_a": k1a, "lokr_w1_b": k1b, "lokr_w2_a": k2a, "lokr_w2_b": k2b, **alpha},
      lambda w: w + 0.5 * 3 * torch.kron(k1a @ k1b, k2a @ k2b).reshape(shape),
    ),
    # PEFT and diffusers: the norm of W + scale · change becomes the vector.
    "dora_peft": (
      {**lora, "lora_magnitude_vector": out.reshape(1, 6, 1, 1) if conv else out},
      lambda w: dora(w + 0.5 * change, rows, out, 0),
    ),
    "dora_peft_default": (
      {**lora, "lora_magnitude_vector.default.weight": out},
      lambda w: dora(w + 0.5 * change, rows, out, 0),
    ),
    # kohya's spelling, as ComfyUI reads it: a step of `scale` towards the changed weight.
    "dora_kohya": (
      {**lora, "dora_scale": out.reshape(6, 1, *ones)},
      lambda w: w + 0.5 * (dora(w + change, rows, out, 0) - w),
    ),
    "dora_kohya_inputs": (
      {**lora, "dora_scale": each.reshape(1, 4, *ones)},
      lambda w: w + 0.5 * (dora(w + change, columns, each, 1) - w),
    ),
    "dora_of_loha": (
      {**halves, **alpha, "dora_scale": out.reshape(6, 1, *ones)},
      lambda w: w + 0.5 * (dora(w + loha, rows, out, 0) - w),
    ),
  }
  if conv:
    t1, t2, down, up = normal(2, 2, 3, 3), normal(2, 2, 3, 3), normal(2, 4), normal(2, 6)
    mid = {"lora_down.weight": down[..., None, None], "lora_mid.weight": t1,
           "lora_up.weight": up.T[..., None, None], **alpha}  # fmt: skip
    core = torch.einsum("ao,abkl,bi->oikl", up, t1, down)
    other = torch.einsum("ao,abkl,bi->oikl", up + 1, t2, down - 1)
    found["lora_three"] = (mid, lambda w: w + 0.5 * 1.5 * core)
    found["loha_three"] = (
      {"hada_t1": t1, "hada_w1_a": up, "hada_w1_b": down, "hada_t2": t2, "hada_w2_a": up + 1,
       "hada_w2_b": down - 1, **alpha}, lambda w: w + 0.5 * 1.5 * core * other,
    )  # fmt: skip
    two, three = normal(2, 3), normal(2, 2)
    second = torch.einsum("ao,abkl,bi->oikl", two, t2, three)
    found["lokr_three"] = (
      {"lokr_w1": k1, "lokr_t2": t2, "lokr_w2_a": two, "lokr_w2_b": three, **alpha},
      lambda w: w + 0.5 * 1.5 * torch.kron(k1.reshape(2, 2, 1, 1), second),
    )
  return found


KINDS = [(conv, kind) for conv in (False, True) for kind in kinds(conv)]


@pytest.mark.parametrize("conv, kind", KINDS, ids=lambda value: str(value))
def test_kinds_of_changes(conv, kind, tmp_path):
  """P22: LoHa, LoKr and DoRA, of linear layers and of convolutions."""
  factors, expected = kinds(conv)[kind]
  module = CONV if conv else QUERY
  key = f"lora_unet_{module.replace('.', '_')}"
  file = {f"{key}.{name}": value.numpy() for name, value in factors.items()}
  path = write(tmp_path / "l.safetensors", file)
  weight = BASE["unet"][f"{module}.weight"]
  changed = merged(Lora(path, 0.5))["unet"][f"{module}.weight"]
  assert np.abs(changed - weight).max() > 0.05
  np.testing.assert_allclose(changed, expected(torch.from_numpy(weight)), rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(merged(Lora(path, 0.0))["unet"][f"{module}.weight"], weight)


def test_diffusers_export_of_a_dora(tmp_path):
  """P22: its converter to kohya's names leaves a dot in the vector's, so it cannot read it back."""
  state = {f"unet.{QUERY}.lora_A.weight": torch.from_numpy(A),
           f"unet.{QUERY}.lora_B.weight": torch.from_numpy(B),
           f"unet.{QUERY}.lora_magnitude_vector": torch.arange(1.0, 7)}  # fmt: skip
  from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

  file = {key: value.numpy() for key, value in convert_state_dict_to_kohya(state).items()}
  assert any(key.endswith("attn1.to_q.lora_magnitude_vector") for key in file)
  changed = merged(Lora(write(tmp_path / "l.safetensors", file)))["unet"][f"{QUERY}.weight"]
  np.testing.assert_allclose(np.linalg.norm(changed, axis=1), np.arange(1.0, 7), rtol=1e-5)


# ---- bad files: one line each

FINE = {"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B}
CONFIG = "adapter_config.json"


@pytest.mark.parametrize(
  "tensors, settings, message",
  [
    ({**FINE, "unet.x.lora_B.weight": B * np.nan}, None, "x.lora_B.weight is not finite"),
    ({**FINE, "unet.x.lora_B.bias": B[0]}, None, "lora_B.bias, which is none of a LoRA.*biases"),
    ({**FINE, "unet.x.lora_B.weight": B.astype(np.int8)}, None, r"x.lora_B.weight is int8 \(6, 2"),
    ({**FINE, "unet.x.alpha": np.ones(0)}, None, r"unet.x.alpha is float64 \(0,\); get it again"),
    ({"lora_unet_x.diff": B}, None, "x.diff, which is none of.*full differences"),
    ({"lora_unet_x.hada_w1_a": B}, None, "lacks the hada_w1_b weights of x"),
    ({"lora_unet_x.lokr_w1": B}, None, "lacks the lokr_w2_a weights of x"),
    ({"lora_unet_x.dora_scale": B}, None, "lacks the down weights of x"),
    ({**FINE, "unet.x.lora_B.weight": B.T}, None, r"\(2, 4\) and \(2, 6\), which do not multiply"),
    ({"lora_unet_x.hada_w1_a": B, "lora_unet_x.hada_w1_b": A, "lora_unet_x.hada_w2_a": B,
      "lora_unet_x.hada_w2_b": A[:, :3]}, None, "which do not multiply"),
    (FINE, "[]", f"{CONFIG} is no JSON object"),
    (FINE, '{"r": 2,', f"{CONFIG} is no JSON "),
    (FINE, '{"r": 4}', f"{CONFIG} says rank 4 of x, and its factors have 2"),
    (FINE, '{"r": 2, "lora_alpha": "much"}', f"{CONFIG} has lora_alpha='much'"),
    (FINE, '{"r": 2, "alpha_pattern": {"(": 1}}', f"{CONFIG} has .*alpha_pattern="),
    (FINE, '{"r": 2, "peft_type": "IA3"}', f"{CONFIG} has peft_type='IA3'; we have LORA, LOHA"),
    (FINE, '{"r": 2, "lora_bias": true}', f"{CONFIG} has lora_bias"),
    (FINE, '{"r": 2, "use_dora": true}', "lacks the lora_magnitude_vector of x"),
    (FINE, '{"init_lora_weights": "pissa_niter_4"}', "'pissa_niter_4', which changes the base"),
    (FINE, None, "for another base .1 of its 1 modules are not in this base: unet's x"),
    ({f"unet.{QUERY}.lora_A.weight": A, f"unet.{QUERY}.lora_B.weight": B,
      f"unet.{QUERY}.lora_magnitude_vector": B[:5, 0]}, None, "have other shapes"),
  ],
)  # fmt: skip
def test_bad_files(tensors, settings, message, tmp_path):
  file = write(tmp_path / "adapter_model.safetensors", tensors)
  if settings is not None:
    (tmp_path / CONFIG).write_text(settings)
  with pytest.raises(UserError, match=message) as error:
    Lora(file).resolve(SHAPES, ORIGINAL)
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_bad_headers_and_folders(tmp_path):
  for text, message in [("{", "is no JSON"), ("[1]", "is no JSON object"),
                        ('{"unet.r": 9}', "says rank 9 of x")]:  # fmt: skip
    file = write(tmp_path / "l.safetensors", FINE, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=f"the lora_adapter_metadata of {file} {message}"):
      Lora(file)
  with pytest.raises(UserError, match="holds no adapter_model.safetensors or pytorch_lora_weig"):
    Lora(tmp_path)
  (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
  with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
    Lora(tmp_path)
  file.write_bytes(file.read_bytes()[:-5])
  with pytest.raises(UserError, match=f"{file} is truncated"):
    Lora(file)
