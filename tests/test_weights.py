"""Files of weights: what is read, and what is refused in one line that names the file."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

from cc_jax.bases.weights import load_weights
from cc_jax.errors import UserError

VALUES = torch.tensor([[1.0, -2.5, 0.1], [3e-3, 400.0, 0.0]])  # [O, I]
FINE = {"weight": VALUES, "bias": torch.ones(2)}


def layer(dtype=jnp.float32):
  return nnx.eval_shape(lambda: nnx.Linear(3, 2, param_dtype=dtype, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float64"])
def test_number_formats(kind, tmp_path):
  """P24: plain float8 as torch reads it, and the others; diffusers, too, takes it as it is."""
  stored = {name: value.to(getattr(torch, kind)) for name, value in FINE.items()}
  safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
  digests = {}
  read = load_weights(layer(), tmp_path, digests=digests)
  assert read.kernel[...].dtype == jnp.float32 and len(digests) == 2
  np.testing.assert_array_equal(read.kernel[...], stored["weight"].float().numpy().T)
  half = load_weights(layer(jnp.bfloat16), tmp_path)
  expected = stored["weight"].float().to(torch.bfloat16).float().numpy().T
  np.testing.assert_array_equal(half.kernel[...].astype(jnp.float32), expected)


def edited(change):
  """A file whose header says something else than its bytes."""

  def write(path):
    safetensors.torch.save_file(FINE, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

  return write


def torch_file(**tensors):
  return lambda path: safetensors.torch.save_file({**FINE, **tensors}, path)


def cut(path):
  safetensors.torch.save_file(FINE, path)
  path.write_bytes(path.read_bytes()[:-3])


FLOAT8 = VALUES.to(torch.float8_e4m3fn)
BAD = {
  "truncated": (cut, "is truncated or not safetensors"),
  "empty": (lambda path: path.write_bytes(b""), "is truncated or not safetensors"),
  "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
          "is Git LFS' pointer to the file; run `git lfs pull`"),
  "web_page": (lambda path: path.write_text("<html>404</html>" * 9), "is truncated or not safet"),
  "shape": (edited(lambda h: h["weight"].update(shape=[2, 4])), "is truncated or not safetensors"),
  "dtype": (edited(lambda h: h["weight"].update(dtype="F64")), "is truncated or not safetensors"),
  "offsets": (edited(lambda h: h["weight"].update(data_offsets=[0, 999])), "is truncated or not s"),
  "nan": (torch_file(weight=VALUES * float("nan")), "weight is not finite .* as float32; get"),
  "infinite": (torch_file(bias=torch.full((2,), float("inf"))), "bias is not finite"),
  "int8": (torch_file(weight=VALUES.to(torch.int8)), "are quantised: weight is stored as int8"),
  "boolean": (torch_file(weight=VALUES > 0), "are quantised: weight is stored as bool"),
  "scaled": (torch_file(weight=FLOAT8, scaled_fp8=torch.ones(1).to(torch.float8_e4m3fn)),
             r"is scaled float8 \(scaled_fp8\), which we do not read; take its float16 version"),
  "scale_weight": (torch_file(weight=FLOAT8, **{"x.scale_weight": torch.ones(1)}),
                   r"is scaled float8 \(x.scale_weight\)"),
  "weight_scale": (torch_file(weight=FLOAT8, **{"x.weight_scale": torch.ones(1)}),
                   r"is scaled float8 \(x.weight_scale\)"),
  "exponents": (torch_file(weight=VALUES.abs().to(torch.float8_e8m0fnu)),
                "weight is F8_E8M0 and cannot be read .*; convert it to float16"),
  "other_names": (torch_file(other=torch.ones(2)), r"belong to another architecture: 1 not expec"),
  "other_shape": (torch_file(weight=torch.ones(3, 2)), r"weight has the shape \(3, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
  """P24, and what else a download or a tool leaves."""
  write, message = BAD[name]
  path = tmp_path / "model.safetensors"
  write(path)
  with pytest.raises(UserError, match=message) as error:
    load_weights(layer(), path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_bad_folders(tmp_path):
  """Pickles, and an index of shards that lies."""
  (tmp_path / "model.bin").write_bytes(b"pickle")
  with pytest.raises(UserError, match="model.bin is a pickle, which can run code"):
    load_weights(layer(), tmp_path)
  index = tmp_path / "model.safetensors.index.json"
  for text, message in [
    ('{"weight_map": {"weight": "a.safetensors"}}', "a.safetensors, named in .*, is missing"),
    ('{"weight_map": {"weight": 3}}', "is no index of weight files"),
    ('{"weight_map": []}', "is no index of weight files"),
    ("{", "is no index of weight files"),
  ]:
    index.write_text(text)
    with pytest.raises(UserError, match=message):
      load_weights(layer(), tmp_path)
  index.write_text('{"weight_map": {"weight": "a.safetensors", "bias": "b.safetensors"}}')
  safetensors.torch.save_file(FINE, tmp_path / "a.safetensors")
  safetensors.torch.save_file({"bias": FINE["bias"]}, tmp_path / "b.safetensors")
  with pytest.raises(UserError, match="b.safetensors has bias, which another file beside it has"):
    load_weights(layer(), tmp_path)
  safetensors.torch.save_file({"weight": VALUES}, tmp_path / "a.safetensors")
  np.testing.assert_array_equal(load_weights(layer(), tmp_path).kernel[...], VALUES.numpy().T)


def test_overflow_is_told(tmp_path):
  """400 million fits float32 and not float16."""
  file = tmp_path / "m.safetensors"
  safetensors.torch.save_file({**FINE, "weight": torch.full((2, 3), 4e8)}, file)
  load_weights(layer(), file)
  with pytest.raises(UserError, match="weight is not finite .NaN or infinity. as float16"):
    load_weights(layer(jnp.float16), file)
