"""Which attention is chosen for what, and that each kind computes the formula and its gradient."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AbstractMesh

from cc_jax import generate
from cc_jax.bases.base import abstract_base
from cc_jax.customcontrast.build import build_customcontrast, eval_shape_only
from cc_jax.errors import UserError
from cc_jax.models import attention_kernels, attention_kinds, dino
from cc_jax.models.attention import Attention
from cc_jax.models.attention_kernels import (
  block_size,
  dot_product_attention,
  pallas_attention,
  with_kernels,
)
from cc_jax.models.attention_kinds import XLA_ONLY, AttentionKernels, choose_kernels
from cc_jax.models.clip_layers import CLIPAttention
from cc_jax.models.dino import SelfAttention
from cc_jax.models.unet import AttentionPooling
from cc_jax.models.vae import VAEAttention
from cc_jax.parallel.attention import mesh_kernels
from cc_jax.parallel.mesh import AXES, make_mesh
from cc_jax.training import loop, setup, step


def device(platform, kind, capability=None):
  return SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


CHIPS = {
  "cpu": device("cpu", "cpu"),
  "t4": device("gpu", "Tesla T4", "7.5"),
  "a100": device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
  "l4": device("gpu", "NVIDIA L4", "8.9"),
  "h100": device("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
  "b200": device("gpu", "NVIDIA B200", "10.0"),
  "rtx5090": device("gpu", "NVIDIA GeForce RTX 5090", "12.0"),
  "mi300": device("gpu", "AMD Instinct MI300X", "gfx942"),
  "v3": device("tpu", "TPU v3"),
  "v4": device("tpu", "TPU v4"),
  "v5e": device("tpu", "TPU v5 lite"),
  "v5p": device("tpu", "TPU v5"),
  "v6e": device("tpu", "TPU v6 lite"),
  "v7x": device("tpu", "TPU7x"),
}
# (head width, queries, keys) -> the chips, in training with bfloat16, that do not leave it to XLA.
TPUS, HOPPER = {"v4", "v5e", "v5p", "v6e", "v7x"}, {"h100"}
CUDNN = {"a100", "l4", "h100", "b200", "rtx5090"}
TABLE = {
  # SD 1.5 at 512 px: self-attention, text, visual tokens
  (40, 4096, 4096): CUDNN | TPUS,
  (80, 1024, 1024): CUDNN | TPUS,
  (160, 256, 256): HOPPER,
  (160, 64, 64): set(),
  (40, 4096, 77): set(),
  (80, 1024, 16): set(),
  # the same at 768 px: 64 modulo 128
  (160, 576, 576): set(),
  # SDXL at 1024 px
  (64, 4096, 4096): CUDNN | TPUS,
  (64, 1024, 1024): CUDNN | TPUS,
  # VAE: 512 and 1024 px
  (512, 4096, 4096): TPUS,
  (512, 16384, 16384): TPUS,
  # image encoders: DINO, CLIP ViT-H
  (64, 197, 197): set(),
  (80, 257, 257): CUDNN,
  # Q-Formers of 16 layers, TV Fusion
  (64, 17, 274): set(),
  (768, 16, 16): set(),
  # a width that cuDNN does not take
  (36, 4096, 4096): TPUS,
}


def choice(chip, shape, *, dtype=jnp.bfloat16, training=True, **more):
  width, queries, keys = shape
  kernels = choose_kernels("auto", CHIPS[chip], dtype=dtype, training=training)
  return kernels.choose(width=width, queries=queries, keys=keys, dtype=dtype, **more)


@pytest.mark.parametrize("shape", TABLE)
def test_the_choice_by_chip_and_shape(shape):
  kinds = {chip: choice(chip, shape) for chip in CHIPS}
  assert {chip for chip, kind in kinds.items() if kind != "xla"} == TABLE[shape]
  assert {kinds[chip] for chip in TPUS} <= {"pallas", "xla"}
  assert {kinds[chip] for chip in CUDNN} <= {"cudnn", "xla"}


@pytest.mark.parametrize("chip", CHIPS)
def test_no_mask_and_on_a_gpu_no_float32(chip):
  for shape in TABLE:
    assert choice(chip, shape, masked=True) == "xla"
    assert choice(chip, shape, dtype=jnp.float32) != "cudnn"
  long = (64, 4096, 4096)
  assert (choice(chip, long, dtype=jnp.float32) == "pallas") == (chip in TPUS)


def test_without_gradients_cudnn_takes_more():
  """The backward passes are narrower, and the reported NaN is theirs."""
  wide = {chip for chip in CHIPS if choice(chip, (160, 256, 256), training=False) == "cudnn"}
  assert wide == {"h100", "b200", "rtx5090"}
  assert choice("a100", (80, 576, 576), training=False) == "cudnn"
  assert choice("a100", (80, 576, 576), training=True) == "xla"


def test_a_batch_that_does_not_divide_over_the_mesh_is_left_to_xla():
  mesh = AbstractMesh((2, 2, 2), AXES)
  kernels = AttentionKernels("pallas", 256, mesh=mesh, batch_axes=("data", "fsdp"))
  shape = dict(width=64, queries=4096, keys=4096, dtype=jnp.bfloat16)
  assert [kernels.choose(**shape, batch=batch) for batch in (8, 6)] == ["pallas", "xla"]


REFUSED = {
  ("cudnn", "cpu", "bfloat16"): "NVIDIA GPU.*this is cpu.*use 'auto'",
  ("cudnn", "t4", "bfloat16"): "compute capability 8.0.*Tesla T4",
  ("cudnn", "mi300", "bfloat16"): "NVIDIA GPU.*AMD",
  ("cudnn", "h100", "float32"): "bfloat16 only .train.dtype, --dtype.*H100.*float32",
  ("cudnn", "v5e", "bfloat16"): "NVIDIA GPU.*TPU v5 lite",
  ("pallas", "h100", "bfloat16"): "needs a TPU, v4 or later; this is NVIDIA H100",
  ("pallas", "v3", "bfloat16"): "v4 or later; this is TPU v3",
  ("pallas", "cpu", "float32"): "needs a TPU",
  ("flash", "v5e", "bfloat16"): "'flash' is unknown; use auto, xla, cudnn, pallas",
}


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_a_kernel_that_the_chip_does_not_have_is_refused(case):
  asked, chip, dtype = case
  with pytest.raises(UserError, match=REFUSED[case]) as error:
    choose_kernels(asked, CHIPS[chip], dtype=dtype, training=True)
  assert "\n" not in str(error.value)


def test_what_the_log_says():
  say = lambda chip, dtype: choose_kernels(  # noqa: E731
    "auto", CHIPS[chip], dtype=dtype, training=True).describe()
  assert say("v5e", "bfloat16") == (
    "attention: pallas on TPU v5 lite from 768 tokens on, with heads up to 512 wide; xla elsewhere, "  # noqa: E501
    "and where there is a mask")
  assert "cudnn on NVIDIA L4 from 256 tokens on, with heads up to 128 wide" in say("l4", "bfloat16")
  assert say("cpu", "bfloat16") == "attention: xla on cpu"
  assert say("l4", "float32").startswith("attention: xla on NVIDIA L4")


# ---- the formula


def formula(q, k, v, g, *, causal=False):
  """softmax(q kᵀ / √d) v of [b, s, n, h], and the gradients for the cotangent g; in float64."""
  q, k, v, g = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, g))
  scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3])
  if causal:
    scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = g @ v.swapaxes(2, 3)
  ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(q.shape[3])
  results = p @ v, ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ g
  return [x.transpose(0, 2, 1, 3) for x in results]


def draw(queries, keys, width, dtype, batch=2, heads=2):
  rng = np.random.default_rng(0)
  lengths = (queries, keys, keys, queries)
  return [jnp.asarray(rng.normal(size=(batch, n, heads, width)), dtype) for n in lengths]


def check(attend, arrays, **options):
  """Result and gradients against the formula: 1e-5 in float32, 1 % in bfloat16."""

  @jax.jit
  def run(q, k, v, g):
    out, pullback = jax.vjp(attend, q, k, v)
    return (out, *pullback(g))

  limit = 1e-5 if arrays[0].dtype == jnp.float32 else 1e-2
  names = ("result", "d query", "d key", "d value")
  with jax.default_matmul_precision("highest"):
    found = run(*arrays)
  for name, value, wanted in zip(names, found, formula(*arrays, **options), strict=True):
    assert value.dtype == arrays[0].dtype
    error = np.linalg.norm(np.asarray(value, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < limit, (name, error)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_xla_is_the_formula(dtype, causal):
  """A mask goes to XLA whatever the kernel: Pallas' would fail here."""
  kernels = AttentionKernels("pallas", 256) if causal else XLA_ONLY
  arrays = draw(77, 77, 40, dtype)
  check(partial(dot_product_attention, kernels=kernels, causal=causal), arrays, causal=causal)


SHAPES = [  # queries, keys, width, dtype: SD 1.5's and SDXL's widths, odd lengths, several blocks
  (130, 77, 40, "float32"),
  pytest.param(130, 77, 40, "bfloat16", marks=pytest.mark.slow),
  *(pytest.param(256, 256, width, dtype, marks=pytest.mark.slow)
    for width in (40, 64, 80, 160) for dtype in ("float32", "bfloat16")),
  pytest.param(64, 64, 160, "float32", marks=pytest.mark.slow),
  pytest.param(1600, 1600, 80, "float32", marks=pytest.mark.slow),  # 2 blocks of 896, padded
  pytest.param(2048, 1024, 64, "bfloat16", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("queries", "keys", "width", "dtype"), SHAPES)
def test_pallas_is_the_formula(queries, keys, width, dtype):
  """Interpreted on the CPU: the same kernel, operation by operation."""
  check(partial(pallas_attention, interpret=True), draw(queries, keys, width, dtype, batch=1))


def test_blocks_pad_little():
  sizes = {n: block_size(n, 64) for n in (77, 768, 1024, 1280, 1600, 2304, 3952, 4096, 9216)}
  assert sizes == {77: 128, 768: 768, 1024: 1024, 1280: 640, 1600: 896, 2304: 768, 3952: 1024,
                   4096: 1024, 9216: 1024}  # fmt: skip
  assert block_size(4096, 512) == 512


@pytest.mark.slow
def test_pallas_on_a_mesh_is_the_formula():
  """8 devices, batch over data and fsdp, heads over tensor where they divide; in a new process."""
  done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["True"] * 2


def compare_on_a_mesh():
  jax.config.update("jax_num_cpu_devices", 8)
  mesh = make_mesh(ml_collections.ConfigDict(dict(data=2, fsdp=2, tensor=2)), 4)
  kernels = AttentionKernels(
    "pallas", 256, mesh=mesh, batch_axes=("data", "fsdp"), head_axis="tensor")
  attention_kinds._LEAST_TOKENS["pallas"] = 1
  attention_kernels.pallas_attention = partial(pallas_attention, interpret=True)
  for heads in (2, 3):
    arrays = draw(130, 77, 40, jnp.float32, batch=4, heads=heads)
    attend = partial(dot_product_attention, kernels=kernels)
    check(attend, arrays)
    print("shard_map" in str(jax.make_jaxpr(attend)(*arrays[:3])))


# ---- the way of the choice


def test_auto_on_a_cpu_changes_nothing():
  """The very program of before: no module gets anything, and the call is JAX's own."""
  mesh = make_mesh(ml_collections.ConfigDict(dict(data=1)), 1)
  kernels = mesh_kernels("auto", mesh, dtype="float32", training=True)
  assert kernels == XLA_ONLY
  q, k, v, _ = draw(8, 4, 8, jnp.float32)
  ours = jax.make_jaxpr(partial(dot_product_attention, kernels=kernels))(q, k, v)
  assert str(ours) == str(jax.make_jaxpr(jax.nn.dot_product_attention)(q, k, v))


def test_the_step_attends_by_the_kernel_of_its_mesh(tiny_folder, monkeypatch):
  """Traced for 8 devices: each long attention, and no other, sees its device's part."""
  seen = []

  def spy(query, key, value):
    seen.append((query.shape, key.shape[1]))
    return jax.nn.dot_product_attention(query, key, value)

  monkeypatch.setattr(attention_kernels, "pallas_attention", spy)
  config = tiny.tiny_config(tiny_folder, train__attention="pallas", train__batch_size=8)
  base = abstract_base(tiny_folder, **setup.base_options(config))
  monkeypatch.setitem(attention_kinds._LEAST_TOKENS, "pallas", 16)
  definition, trainable, frozen = build_customcontrast(
    base, *setup.adapter_configs(config), dtype="float32", transform=eval_shape_only)
  context = setup.make_step_context(config, definition, base)
  state = jax.eval_shape(partial(step.init_state, config=config), trainable)
  batch = next(tiny.batches(base.tokenizers[0], 8))
  mesh = AbstractMesh((4, 1, 2), AXES)
  step_fn = step.make_train_step(context, mesh, state, frozen)
  jax.eval_shape(step_fn, state, frozen, batch, np.uint32(0))

  # Four transformers of 16 tokens, 2 heads 8 wide; as many tokens has the text. Fewer have the
  # visual tokens and the references' patches.
  assert seen == [((2, 16, 1, 8), 16)] * 8


MODULES = {
  "UNet": (lambda **kw: Attention(16, heads=2, **kw), (2, 6, 16), {}),
  "pooled text": (lambda **kw: AttentionPooling(16, heads=2, **kw), (2, 6, 16), {}),
  "VAE": (lambda **kw: VAEAttention(16, 2, **kw), (2, 3, 2, 16), {}),
  "CLIP": (lambda **kw: CLIPAttention(16, 2, **kw), (2, 6, 16), dict(causal=False)),
  "CLIP, causal": (lambda **kw: CLIPAttention(16, 2, **kw), (2, 6, 16), dict(causal=True)),
  "DINO": (lambda **kw: SelfAttention(dino.DinoConfig(hidden_size=16, num_attention_heads=2), **kw),
           (2, 6, 16), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_all_networks_take_the_kernels(name, monkeypatch):
  make, shape, options = MODULES[name]
  seen = []

  def spy(query, key, value):
    seen.append(query.shape)
    return jax.nn.dot_product_attention(query, key, value)

  monkeypatch.setattr(attention_kernels, "pallas_attention", spy)
  monkeypatch.setitem(attention_kinds._LEAST_TOKENS, "pallas", 1)
  module = make(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  plain = module(x, **options)
  assert seen == []
  with_kernels(module, AttentionKernels("pallas", 512))
  np.testing.assert_array_equal(module(x, **options), plain)
  assert len(seen) == (name != "CLIP, causal")


def test_impossible_kernels_are_refused_before_a_base_is_read(tiny_folder, tmp_path, monkeypatch):
  def never(*_, **__):
    raise AssertionError("the base is read")

  monkeypatch.setattr(loop, "load_base", never)
  config = tiny.tiny_config(tiny_folder, train__attention="cudnn")
  with pytest.raises(UserError, match="'cudnn' needs an NVIDIA GPU"):
    loop.train(config, tmp_path)
  monkeypatch.setattr("cc_jax.sampling.pipeline.load_base", never)
  with pytest.raises(UserError, match="'pallas' needs a TPU"):
    generate.load(attention="pallas")


# ---- chips that are not there


@pytest.fixture
def cudnn(monkeypatch):
  """JAX's own conditions of cuDNN's attention, as if the machine had a GPU: set its capability."""
  source = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  capability = []
  monkeypatch.setattr(source, "check_cudnn_version", lambda: 91801)
  monkeypatch.setattr(
    source, "check_compute_capability", lambda least: float(capability[-1]) >= float(least))
  monkeypatch.setattr(
    source, "is_cuda_compute_capability_equal", lambda which: capability[-1] == which)
  monkeypatch.setattr(source, "set_capability", capability.append, raising=False)
  return source


@pytest.mark.parametrize("chip", sorted(CUDNN))
def test_jax_takes_what_cudnn_is_chosen_for(chip, cudnn):
  cudnn.set_capability(CHIPS[chip].compute_capability)

  def jax_takes(shape, training):
    width, queries, keys = shape
    q, k = (jax.ShapeDtypeStruct((1, n, 1, width), jnp.bfloat16) for n in (queries, keys))
    layout = cudnn.AttentionLayout.BTNH.value
    try:
      cudnn.check_is_flash_attention(q, k, k, layout, 91801, False, training)
    except NotImplementedError:
      return False
    return True

  for shape in TABLE:
    for training in (True, False):
      if choice(chip, shape, training=training) == "cudnn":
        assert jax_takes(shape, training), shape
  assert jax_takes((160, 256, 256), True) == (chip not in ("a100", "l4"))
  assert not jax_takes((36, 4096, 4096), True) and not jax_takes((512, 4096, 4096), False)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_cudnn_is_called_without_a_mask_and_on_a_device_s_own_part(sizes, cudnn):
  """The program that a GPU would get; no GPU is needed to write it."""
  cudnn.set_capability("9.0")
  mesh = AbstractMesh(sizes, AXES) if max(sizes) > 1 else None
  places = mesh and dict(mesh=mesh, batch_axes=("data", "fsdp"), head_axis="tensor")
  kernels = choose_kernels(
    "auto", CHIPS["h100"], dtype="bfloat16", training=True, **(places or {}))
  x = jax.ShapeDtypeStruct((8, 1024, 8, 80), jnp.bfloat16)
  backward = lambda q, k, v, g: jax.vjp(  # noqa: E731
    partial(dot_product_attention, kernels=kernels), q, k, v)[1](g)
  text = jax.jit(backward).trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()
  calls = [line for line in text.splitlines() if "__cudnn$" in line]
  assert ["Backward" in line for line in calls] == [False, True]
  part = "2x1024x4x80xbf16" if mesh else "8x1024x8x80xbf16"
  assert all("NO_MASK" in line and f"tensor<{part}>" in line for line in calls), calls


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.slow
def test_kernels_compile_for_a_tpu(topology):
  """SD 1.5's and SDXL's long attentions, forward and backward, on a mesh; the host is a CPU."""
  pytest.importorskip("libtpu")
  from cc_jax.plan.topology import find_slice

  devices = find_slice(topology, "bfloat16").devices
  for sizes in (dict(data=2, tensor=2),):
    mesh = make_mesh(ml_collections.ConfigDict(sizes), 4, devices=devices)
    kernels = mesh_kernels("auto", mesh, dtype="bfloat16", training=True)
    assert kernels.kernel == "pallas"
    for tokens, heads, width in ((4096, 8, 40), (1024, 8, 80), (4096, 10, 64), (1024, 20, 64)):
      arrays = [jax.ShapeDtypeStruct(
        (4, tokens, heads, width), jnp.bfloat16,
        sharding=jax.NamedSharding(mesh, jax.P(("data", "fsdp")))) for _ in range(4)]  # fmt: skip
      backward = lambda q, k, v, g: jax.vjp(  # noqa: E731
        partial(dot_product_attention, kernels=kernels), q, k, v)[1](g)  # noqa: B023
      text = jax.jit(backward).lower(*arrays).compile().as_text()
      assert text.count('custom_call_target="tpu_custom_call"') == 2, (sizes, tokens, width)


if __name__ == "__main__":
  compare_on_a_mesh()
