"""Adapter files: which bases they run on, what a damaged one says, and docs/adapter_format.md."""

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny
from PIL import Image

from cc_jax.bases.base import load_base
from cc_jax.bases.save import save_base, save_module
from cc_jax.customcontrast.adapter_base import check_base, describe_base
from cc_jax.customcontrast.adapter_file import Adapter, load_adapter, save_adapter
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.errors import UserError
from cc_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from cc_jax.sampling.pipeline import load
from cc_jax.training.setup import adapter_configs

PAGE = (Path(__file__).parents[1] / "docs" / "adapter_format.md").read_text()
NEW = ("prediction_type", "base_hashes", "base_shapes")  # entries that the first files lacked
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def base(tiny_folder):
  return load_base(tiny_folder)


@pytest.fixture(scope="module")
def file(base, tiny_folder, tmp_path_factory):
  """An adapter of the tiny base with random tensors, as a training writes it."""
  encoder, injection = adapter_configs(tiny.tiny_config(tiny_folder))
  _, trainable, _ = build_customcontrast(base, encoder, injection, transform=eval_shape_only)
  rng = np.random.default_rng(1)
  tensors = {
    name: (rng.standard_normal(x.shape) / np.sqrt(x.shape[0] if x.ndim > 1 else 1)).astype("f4")
    for name, x in trainable.items()
  }
  path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
  save_adapter(path, tensors, encoder=encoder, injection=injection, notes={"steps": "4"},
               **describe_base(base))
  return path


def rewritten(file: Path, path: Path, tensors=None, drop=(), **metadata) -> Path:
  """The file with other tensors and metadata entries, and without some."""
  with safetensors.safe_open(file, "np") as old:
    entries = {k: v for k, v in (old.metadata() | metadata).items() if k not in drop}
    values = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
  safetensors.numpy.save_file(values | (tensors or {}), path, metadata=entries)
  return path


def finetuned(folder: Path, copy: Path, file: str, change) -> Path:
  """A copy of a base in which `change` was done to one JSON file or to one file's tensors."""
  shutil.copytree(folder, copy)
  path = copy / file
  if path.suffix == ".json":
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
  else:
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({k: change * v for k, v in tensors.items()}, path)
  return copy


# ---- other bases: C5


@pytest.fixture(scope="module")
def pipe(file):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    return load(file)


def test_an_adapter_draws_on_copies_and_finetunes_of_its_base(
  base, file, pipe, tiny_folder, tmp_path, monkeypatch
):
  """C5: the same weights in float16, and another UNet: a warning that names both, and a picture."""
  save_base(base, tmp_path / "half", dtype="float16")
  weights = "unet/diffusion_pytorch_model.safetensors"
  tuned = finetuned(tiny_folder, tmp_path / "tuned", weights, np.float32(0.8))
  here = re.escape(f"{file} was trained on the base '{tiny_folder}' ({base.hash[:12]}), and ")
  parts = "image_encoder, text_encoder, unet, vae"
  with pytest.warns(UserWarning, match=f"{here}'.*/half' .* has other weights in {parts}\\. ") as w:
    half = load(file, tmp_path / "half")
  assert len(w) == 1 and w[0].filename == __file__
  assert "\n" not in str(w[0].message) and half.base.hash[:12] in str(w[0].message)
  with pytest.warns(UserWarning, match=f"{here}'.*/tuned' .* has other weights in unet\\. "):
    other = load(file, tuned)
  with pytest.raises(UserError, match="other weights in unet; load that base, or leave strict"):
    load(file, tuned, strict_base=True)

  picture = np.full((16, 16, 4), 200, np.uint8)
  picture[:4, :, 3] = 0
  drawn = []
  for params in (pipe.sampler.params, half.sampler.params, other.sampler.params):
    monkeypatch.setattr(pipe.sampler, "params", params)  # of one program, compiled once
    images = pipe("a duck", class_noun="duck", references=[Image.fromarray(picture)], steps=1)
    drawn.append(np.asarray(images[0], int))
  assert np.abs(drawn[1] - drawn[0]).max() <= 3 < np.abs(drawn[2] - drawn[0]).max()


def test_a_base_of_another_prediction_type_is_refused(file, tiny_folder, tmp_path):
  """C5: all weights are equal, and every picture would be wrong."""
  copy = finetuned(tiny_folder, tmp_path / "copy", "scheduler/scheduler_config.json",
                   {"prediction_type": "epsilon"})
  message = "UNet predicts v_prediction, and that of '.*/copy' predicts epsilon; give a base"
  with pytest.raises(UserError, match=message):
    load(file, copy)
  # What an older file does not say is no reason to refuse; the warning says that nobody knows.
  old = rewritten(file, tmp_path / "old.safetensors", drop=NEW, base_hash="0" * 64)
  with pytest.warns(UserWarning, match="has other weights. That .* predicted epsilon .* not say"):
    load(old, copy)


@pytest.mark.parametrize(("shapes", "message"), [
  (dict(text_widths=[768]),
   r"'.*' with text encoders of width \[768\] \(Stable Diffusion 1.x\), .* has .* width \[12\]; "
   "give a base of its family by --base, or train"),
  (dict(text_widths=[768, 1280]), r"\[768, 1280\] \(SDXL\)"),
  (dict(cross_attention_layers=70), "with 70 cross-attention layers, and .* has 4 "),
  (dict(image_width=1280), "image encoder of width 1280, .* has .* width 18; .*--image_encoder"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_a_base_of_another_family_is_refused(base, file, shapes, message):
  """C5: before any tensor is compared, in words of the base."""
  adapter = load_adapter(file)
  other = dataclasses.replace(adapter, base_shapes=adapter.base_shapes | shapes)
  with pytest.raises(UserError, match=message) as caught:
    check_base(other, base)
  assert "\n" not in str(caught.value)
  check_base(dataclasses.replace(adapter, base_shapes={}), base)


def test_tensors_that_do_not_fit_are_refused_whatever_the_file_says(file, tmp_path):
  wide = {"mfi_encoder.heads.0.kernel": np.zeros((8, 20), np.float32)}
  old = rewritten(file, tmp_path / "old.safetensors", wide, drop=NEW)
  with pytest.raises(UserError, match=r"wrong shape: .*kernel \(8, 20\) instead of \(8, 12\)"):
    load(old)


def test_the_image_encoder_is_the_adapters_own(file, tiny_folder, tmp_path):
  """C5: another one's features mean nothing to it: told by name, or refused for its width."""
  for seed, changes in (("narrow", dict(hidden_size=12)), ("other", {})):
    config = CLIPVisionConfig.from_dict(tiny.VISION | changes)
    save_module(tiny.random_module(CLIPVisionModel, config, 5), tmp_path / seed)
  with pytest.raises(UserError, match="image encoder of width 18, .* width 12; .*--image_encoder"):
    load(file, image_encoder=tmp_path / "narrow")
  with pytest.warns(UserWarning, match=f"'{tiny_folder}' .* other weights in image_encoder. "):
    load(file, image_encoder=tmp_path / "other")
  # A path of the machine that trained: given here it is found, and not given the error says how.
  config = json.loads(load_metadata(file)["config"])
  config["encoder"]["image_encoder"] = "/home/somebody/clip"
  moved = rewritten(file, tmp_path / "moved.safetensors", config=json.dumps(config))
  with pytest.raises(UserError, match="/home/somebody/clip.*give --base and --image"):
    load(moved)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    load(moved, image_encoder=tiny_folder / "image_encoder")


def test_a_base_that_is_elsewhere_now(file, tmp_path):
  moved = rewritten(file, tmp_path / "moved.safetensors", base="/home/somebody/sd15")
  with pytest.raises(UserError, match="/home/somebody/sd15' is no folder .*, give --base"):
    load(moved)


# ---- files that are damaged


def load_metadata(file: Path) -> dict[str, str]:
  with safetensors.safe_open(file, "np") as opened:
    return opened.metadata()


def broken_config(**changes) -> str:
  encoder = dict(image_layers=[1], width=8, depth=1, heads=2, visual_queries=3, textual_queries=2,
                 s_words=2) | changes
  return json.dumps({"encoder": encoder, "injection": {}})


DAMAGED = {
  "no version": (dict(drop=("format_version",)), "lack 'format_version'; get the file again"),
  "a version in words": (dict(format_version="one"), "format_version is 'one' and no number"),
  "a newer version": (dict(format_version="2"), "format 2, this version reads up to 1; update"),
  "no config": (dict(drop=("config",)), "lack 'config'"),
  "config no JSON": (dict(config="{'encoder'"), "entry 'config' is no JSON object"),
  "config nested for ever": (dict(config="[" * 100_000), "entry 'config' is no JSON object"),
  "config a list": (dict(config="[]"), "entry 'config' is no JSON object"),
  "config a number": (dict(config='{"encoder": 5, "injection": {}}'), "image_layers is missing"),
  "a width in quotes": (dict(config=broken_config(width="8")), "width is '8'; it must be .* int"),
  "a width of 0": (dict(config=broken_config(width=0)), "width is 0; it must be at least 1"),
  "an unknown key": (dict(config=broken_config(colour=1)), "colour is unknown; .*; if a newer"),
  "an unknown choice": (dict(config=broken_config(fusion="sum")), "fusion is 'sum'; use one of"),
  "no base": (dict(drop=("base",)), "lack 'base'"),
  "no hash": (dict(drop=("base_hash",)), "lack 'base_hash'"),
  "notes a list": (dict(notes="[1]"), "entry 'notes' is no JSON object"),
  "hashes no JSON": (dict(base_hashes="?"), "entry 'base_hashes' is no JSON object"),
  "shapes a number": (dict(base_shapes="3"), "entry 'base_shapes' is no JSON object"),
  "not a number": (dict(tensors={"mfi_encoder.visual.queries": np.full((4, 8), np.nan, "f4")}),
                   "mfi_encoder.visual.queries is not finite"),
  "infinite": (dict(tensors={"mfi_encoder.visual.queries": np.full((4, 8), np.inf, "f2")}),
               "mfi_encoder.visual.queries is not finite"),
  "integers": (dict(tensors={"mfi_encoder.visual.queries": np.ones((4, 8), np.int8)}),
               "mfi_encoder.visual.queries is int8"),
  "of another program": (dict(format="pt"), "no CustomContrast adapter"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_one_line(file, tmp_path, fault):
  """P18's kind: values of other types, in a file."""
  changes, message = DAMAGED[fault]
  path = rewritten(file, tmp_path / "bad.safetensors", **changes)
  with pytest.raises(UserError, match=message) as caught:
    load_adapter(path)
  assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_notes_that_make_no_sense_are_one_line(file, pipe, monkeypatch):
  for notes in ({"reference_share": "much"}, {"reference_share": "0"}, {"reference_place": "left"}):
    monkeypatch.setattr(pipe, "adapter", dataclasses.replace(pipe.adapter, notes=notes))
    with pytest.raises(UserError, match=f"{file}: its notes .*; get the file again"):
      pipe.read_references(np.full((4, 4, 4), 200, np.uint8))


# ---- docs/adapter_format.md


def table(heading: str) -> list[tuple[str, str]]:
  """(first cell without backticks, second cell) of the rows below a heading."""
  section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
  rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section, re.MULTILINE)
  assert rows, heading
  return rows


def test_the_page_lists_every_entry_of_the_metadata(file, tmp_path):
  rows = dict(table("Metadata"))
  metadata = load_metadata(file)
  assert set(rows) == set(metadata)
  assert metadata["format_version"] == "1"  # files with the new entries are of version 1 too
  assert {key for key, needed in rows.items() if needed.strip() == "no"} == set(NEW)
  shapes = json.loads(metadata["base_shapes"])
  assert shapes == dict(text_widths=[12], cross_attention_layers=4, image_width=18)
  for key in shapes:
    assert f"`{key}`" in PAGE
  hashes = json.loads(metadata["base_hashes"])
  assert set(hashes) == {"unet", "vae", "text_encoder", "image_encoder"}
  # What the page calls optional is optional.
  older = load_adapter(rewritten(file, tmp_path / "old.safetensors", drop=NEW))
  assert (older.prediction_type, older.base_hashes, older.base_shapes) == ("", {}, {})
  fields = {field.name for field in dataclasses.fields(Adapter)}
  assert set(NEW) <= fields


TINY = dict(D=8, P=2 * 18, V=3, Q=2, E=12, C=16, T=32, H=4)  # of tests/tiny.py
SD15 = dict(D=768, P=4 * 1280, V=16, Q=16, E=768, T=1280, H=64)
SD15_LAYERS = {320: 5, 640: 5, 1280: 6}  # widths of the UNet's cross-attentions and how many


def shape(text: str, sizes: dict[str, int]) -> tuple[int, ...]:
  """'[1 + V, 4·D]' as numbers."""
  return tuple(eval(text.replace("·", "*"), {}, sizes))


def test_the_page_lists_every_tensor(file):
  claimed, numbers, count = {}, 0, 0
  found = {name: x.shape for name, x in load_adapter(file).tensors.items()}
  for name, dimensions in table("Tensors"):
    pattern = re.escape(name).replace("N", r"\d+").replace("LAYER", r"[\w.]+\.attn2")
    names = [n for n in found if re.fullmatch(pattern, n)]
    assert names, name
    assert not claimed.keys() & set(names)
    claimed |= {n: shape(dimensions, TINY) for n in names}
    # The same of Stable Diffusion 1.5, whose totals the page gives.
    layers = SD15_LAYERS if "LAYER" in name else {0: 4 if "blocks" in name else 1}
    count += sum(layers.values())
    numbers += sum(n * int(np.prod(shape(dimensions, SD15 | {"C": c}))) for c, n in layers.items())
  assert claimed == found
  assert f"{count}\ntensors, {numbers / 1e6:.1f} M" in PAGE
  for symbol, value in SD15.items():
    assert re.search(rf"^\| {symbol} \| .* \| {value} \|$", PAGE, re.MULTILINE), symbol


def test_the_pages_own_reader_reads(file, monkeypatch, capsys):
  code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
  monkeypatch.chdir(file.parent)
  exec(code, {})  # of our own page
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].startswith("1 ") and "v_prediction" in printed[0]
  assert len(printed) == 1 + len(load_adapter(file).tensors)
