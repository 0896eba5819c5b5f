"""Masks by a network in an ONNX file: how it is shown pictures, and `generate --mask=auto`."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_onnx
from absl import flags
from PIL import Image

from cc_jax import generate
from cc_jax.errors import UserError
from cc_jax.models.attention_kinds import XLA_ONLY
from cc_jax.sampling import auto_masks
from data_pipeline.errors import DataError
from data_pipeline.segment import Segmenter

SIDE = 16
WEIGHTS, BIAS = np.array([0.1, -0.05, 0.03]), 0.4
PICTURE = np.random.default_rng(0).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def runtime(request):
  if "without_onnxruntime" not in request.node.name:
    pytest.importorskip("onnxruntime", reason="segmenters are run by onnxruntime")


def write(path, weights=WEIGHTS, bias=BIAS, side=SIDE):
  path.write_bytes(tiny_onnx.weighted_sum(weights, bias, side))
  return path


def one_line(error):
  assert "\n" not in str(error.value)


# What the networks' own programs do to a picture (the sources are in segment.py).
SHOWN = {
  "u2net": lambda x: (x / x.max() - MEAN) / STD,
  "isnet": lambda x: x / 255 - 0.5,
  "birefnet": lambda x: (x / 255 - MEAN) / STD,
}


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("side", [SIDE, "side"])
def test_each_kind_is_shown_pictures_as_it_was_trained(kind, side, tmp_path):
  segmenter = Segmenter(f"{write(tmp_path / 'a.onnx', side=side)}:{kind}")
  if side == SIDE:
    picture = PICTURE
  else:  # the side is the kind's own
    n = {"u2net": 320, "isnet": 1024, "birefnet": 1024}[kind]
    picture = np.tile(PICTURE, (n // SIDE, n // SIDE, 1))
  values = SHOWN[kind](picture.astype(float)) @ WEIGHTS + BIAS
  assert values.min() > -0.01 and values.max() < 1.01
  np.testing.assert_allclose(segmenter(picture), np.clip(values, 0, 1) * 255, atol=0.51)


def test_values_of_before_the_sigmoid(tmp_path):
  segmenter = Segmenter(f"{write(tmp_path / 'a.onnx', 16 * WEIGHTS, -1)}:isnet")
  logits = SHOWN["isnet"](PICTURE.astype(float)) @ (16 * WEIGHTS) - 1
  assert logits.min() < -1 and logits.max() > -0.5
  np.testing.assert_allclose(segmenter(PICTURE), 255 / (1 + np.exp(-logits)), atol=0.51)


def test_the_mask_lies_on_the_picture_and_is_not_stretched(tmp_path):
  """The mask of this network is the red channel: a ramp up to 100, in a picture of other sides."""
  segmenter = Segmenter(tiny_onnx.write_red(tmp_path / "a.onnx"))
  picture = np.zeros((48, 80, 3), np.uint8)
  picture[..., 0] = np.linspace(0, 100, 80)[None]
  picture[..., 2] = 200
  mask = segmenter(picture)
  assert mask.shape == (48, 80) and mask.dtype == np.uint8
  assert np.abs(mask.astype(int) - picture[..., 0])[:, 3:-3].max() <= 2
  np.testing.assert_array_equal(segmenter(np.dstack([picture, picture[..., :1]])), mask)  # RGBA
  picture[..., 0] = 0
  assert segmenter(picture).max() == 0


def test_the_kind_is_told_by_the_user_the_name_or_the_side(tmp_path):
  for name, side, kind in (
    ("u2netp.onnx", SIDE, "u2net"), ("isnet-general-use.onnx", SIDE, "isnet"),
    ("BiRefNet-general.onnx", 1024, "birefnet"), ("bria-rmbg-2.0.onnx", 1024, "birefnet"),
    ("rmbg-1.4.onnx", 1024, "isnet"), ("a.onnx", 320, "u2net"), ("medium", 1024, "isnet"),
    ("u2netp.onnx:isnet", 320, "isnet"), ("c:a.onnx", 320, "u2net"),
  ):
    write(tmp_path / name.removesuffix(":isnet"), side=side)
    assert Segmenter(f"{tmp_path}/{name}").kind == kind, name


def test_bytes_of_the_file_and_the_kind_are_its_fingerprint(tmp_path):
  file = write(tmp_path / "a.onnx")
  prints = [Segmenter(f"{file}:{kind}").fingerprint() for kind in ("isnet", "isnet", "u2net")]
  write(file, bias=0.5)
  prints.append(Segmenter(f"{file}:isnet").fingerprint())
  assert prints[0] == prints[1] and len(set(prints)) == 3


def test_what_cannot_be_a_segmenter(tmp_path):
  shape, out = [1, 3, 8, 8], tiny_onnx.value_info("mask", [1, 3, 8, 8])
  info, add = tiny_onnx.value_info, tiny_onnx.node("Add", ["a", "b"], "mask")
  files = {
    "text.onnx": b"no network",
    "two.onnx": tiny_onnx.model([add], [info("a", shape), info("b", shape)], [out]),
    "whole_numbers.onnx": tiny_onnx.model(
      [tiny_onnx.node("Identity", ["a"], "mask")], [info("a", shape, tiny_onnx.INT32)],
      [info("mask", shape, tiny_onnx.INT32)]),
    "grey.onnx": tiny_onnx.model(
      [tiny_onnx.node("Relu", ["a"], "mask")], [info("a", [1, 1, 8, 8])],
      [info("mask", [1, 1, 8, 8])]),
    "unknown.onnx": tiny_onnx.weighted_sum(WEIGHTS, BIAS, 8),
    "open.onnx": tiny_onnx.weighted_sum(WEIGHTS, BIAS),
  }
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  for name, message in {
    "none.onnx": "none.onnx is missing; name the .onnx file",
    "text.onnx": "text.onnx cannot be loaded .*; give an .onnx file",
    "two.onnx": r"two.onnx takes a \[1, 3, 8, 8\], b .*one picture",
    "whole_numbers.onnx": r"takes tensor\(int32\).*floating point",
    "grey.onnx": r"takes a \[1, 1, 8, 8\]",
    "unknown.onnx": "pictures of 8 x 8 pixels, .*; write .*unknown.onnx:birefnet|isnet|u2net",
    "open.onnx": "pictures of any size, .*",
    "unknown.onnx:sam": "'sam' is no kind .*; write .*unknown.onnx:birefnet|isnet|u2net",
  }.items():
    with pytest.raises(DataError, match=message) as error:
      Segmenter(f"{tmp_path}/{name}")
    one_line(error)
  relu = tiny_onnx.model([tiny_onnx.node("Relu", ["a"], "mask")], [info("a", shape)], [out])
  (tmp_path / "three.onnx").write_bytes(relu)
  with pytest.raises(DataError, match=r"gives \[1, 3, 8, 8\].*one mask") as error:
    Segmenter(f"{tmp_path}/three.onnx:isnet")(PICTURE)
  one_line(error)


def test_without_onnxruntime_there_is_a_remedy(monkeypatch):
  monkeypatch.setitem(sys.modules, "onnxruntime", None)
  with pytest.raises(DataError, match="onnxruntime.* is not installed; pip install onnxruntime"):
    Segmenter("u2netp.onnx")


# ---- the command


@pytest.fixture
def drawn(monkeypatch, tmp_path):
  """drawn(**flags): the masks that the command hands to the pipeline."""
  seen = {}

  class Pipeline:
    source, base = "a file", SimpleNamespace(name="a base", hash="1234")
    sampler = SimpleNamespace(kernels=XLA_ONLY)

    def __call__(self, **given):
      seen.update(given)
      return [Image.new("RGB", (4, 4), "red")]

  def load(*args, **kwargs):
    seen["loaded"] = True
    return Pipeline()

  monkeypatch.setattr("cc_jax.sampling.pipeline.load", load)
  monkeypatch.chdir(tmp_path)
  red = np.zeros((20, 20, 3), np.uint8)
  red[5:15, 5:15, 0] = 255
  Image.fromarray(red).save("red.png")
  Image.fromarray(red[..., ::-1].copy()).save("blue.png")
  Image.fromarray(np.dstack([red, red[..., 0]])).save("cut.png")
  Image.fromarray(red[..., 0]).save("mask.png")
  segmenter = tiny_onnx.write_red(tmp_path / "a.onnx", 20)

  def call(**changes):
    seen.clear()
    values = flags.FlagValues()
    generate.define_flags(values)
    given = dict(reference="red.png", mask="auto", segmenter=segmenter, class_noun="cup",
                 prompt="a cup", out="out.png") | changes
    values(["generate", *(f"--{k}={v}" for k, v in given.items() if v is not None)])
    generate.main([], values)
    return seen["masks"]

  call.seen, call.red = seen, red[..., 0]
  return call


def test_auto_masks_reach_the_pipeline(drawn):
  (mask,) = drawn()
  np.testing.assert_array_equal(mask, drawn.red)
  assert json.loads(Image.open("out.png").text["cc_jax"])["segmenter"].endswith("a.onnx:isnet")
  first, second = drawn(reference="red.png,cut.png")  # its alpha channel says more
  assert second is None and np.array_equal(first, drawn.red)
  first, second = drawn(reference="red.png,red.png", mask="mask.png,auto")
  assert first == "mask.png" and np.array_equal(second, drawn.red)
  two = dict(class_noun="cup,ball", prompt="a cup and a ball")
  (none, mask), (third,) = drawn(reference="cut.png+red.png,red.png", **two)
  assert none is None and np.array_equal(mask, drawn.red) and np.array_equal(third, drawn.red)
  (none, mask), (third,) = drawn(reference="red.png+red.png,red.png", mask="+auto,auto", **two)
  assert none is None and np.array_equal(mask, drawn.red) and np.array_equal(third, drawn.red)


def test_mistakes_with_auto_masks_are_found_before_the_base_is_loaded(drawn):
  for changes, message in (
    (dict(segmenter=None), "--mask=auto needs .*--segmenter=FILE.onnx"),
    (dict(mask=None), "--segmenter=.* has nothing to cut out; .*--mask=auto"),
    (dict(segmenter="none.onnx"), "none.onnx is missing"),
    (dict(reference="blue.png"), "finds no subject in blue.png .*0 of 255.*; give a --mask"),
    (dict(reference="a.onnx"), "a.onnx is not a picture"),
    (dict(reference="red.png,red.png", mask="auto,none.png"), "none.png is missing"),
  ):
    with pytest.raises(UserError, match=message) as error:
      drawn(**changes)
    one_line(error)
    assert not drawn.seen


def test_python_has_the_same_door(drawn):
  segmenter = Segmenter("a.onnx:isnet")
  np.testing.assert_array_equal(auto_masks.auto_mask("red.png", segmenter), drawn.red)
  np.testing.assert_array_equal(
    auto_masks.auto_mask(Image.open("red.png"), segmenter), drawn.red)
