"""mfu and hfu: the FLOPs that a step needs, and those that its compiled program does."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cc_jax.plan import chips, hlo
from cc_jax.plan.estimate import make_estimate
from cc_jax.plan.lower import _build, train_program
from cc_jax.plan.model_flops import jaxpr_flops, model_flops
from cc_jax.training import utilisation
from cc_jax.training.utilisation import measure_utilisation, plain_context

# Custom calls as jax 0.10.2 compiles them for an H100 (fewer fields in their descriptions).
FMHA = (
  'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": '
  '"BF16", "dimensions": ["2", "8", "256", "77"], "layout": {"minor_to_major": ["3", "2"]}}}}'
)
GEMM = (
  'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":'
  '["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}'
)
CONV = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
GPU = f"""\
HloModule jit_step, is_scheduled=true

%triton (a0: bf16[64,32], a1: bf16[32,16]) -> bf16[64,16] {{
  %a0 = bf16[64,32]{{1,0}} parameter(0)
  %a1 = bf16[32,16]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[64,16]{{1,0}} dot(%a0, %a1), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

ENTRY %main (x: bf16[2,32,32,64]) -> bf16[2,256,8,40] {{
  %x = bf16[2,32,32,64]{{3,2,1,0}} parameter(0)
  %w = bf16[128,3,3,64]{{3,2,1,0}} parameter(1)
  %dy = bf16[2,16,16,128]{{3,2,1,0}} parameter(2)
  %p0 = f32[128,64]{{1,0}} parameter(3)
  %p1 = f32[64,32]{{1,0}} parameter(4)
  %b0 = bf16[16,256,77]{{2,1,0}} parameter(5)
  %b1 = bf16[16,77,24]{{2,1,0}} parameter(6)
  %q = bf16[2,256,8,40]{{3,2,1,0}} parameter(7)
  %k = bf16[2,77,8,40]{{3,2,1,0}} parameter(8)
  %l = f32[2,8,256]{{2,1,0}} parameter(9)
  %t0 = bf16[64,32]{{1,0}} parameter(10)
  %t1 = bf16[32,16]{{1,0}} parameter(11)
  %forward = (bf16[2,16,16,128]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %w), {CONV}, custom_call_target="__cudnn$convForward"
  %input = (bf16[2,32,32,64]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%dy, %w), {CONV}, custom_call_target="__cudnn$convBackwardInput"
  %filter = (bf16[128,3,3,64]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %dy), {CONV}, custom_call_target="__cudnn$convBackwardFilter"
  %gemm = f32[128,32]{{1,0}} custom-call(%p0, %p1), custom_call_target="__cublas$gemm"
  %lt = (bf16[16,256,24]{{2,1,0}}, s8[4194304]{{0}}) custom-call(%b0, %b1), custom_call_target="__cublas$lt$matmul", {GEMM}
  %attention = (bf16[2,8,256,40]{{3,1,2,0}}, f32[2,8,256]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", {FMHA}
  %gradient = (bf16[2,8,256,40]{{3,1,2,0}}, bf16[2,8,77,40]{{3,1,2,0}}, bf16[2,8,77,40]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k, %l, %q, /*index=5*/%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", {FMHA}
  %triton_gemm = bf16[64,16]{{1,0}} fusion(%t0, %t1), kind=kCustom, calls=%triton
  %unknown = f32[128,32]{{1,0}} custom-call(%gemm), custom_call_target="cub_sort"
  ROOT %out = bf16[2,256,8,40]{{3,2,1,0}} copy(%q)
}}
"""  # noqa: E501


def test_libraries_of_a_gpu():  # C8
  program = hlo.Program(GPU)
  steps = {step.name: step for step in program.steps}
  # Per axis 16 outputs of 3 taps, of which the first has one in the padding.
  convolution = 2 * 2 * (16 * 3 - 1) ** 2 * 64 * 128
  product = 2 * 2 * 8 * 256 * 77 * 40  # q kᵀ of the attention, and each of the others
  by_hand = {
    "forward": convolution, "input": convolution, "filter": convolution,
    "gemm": 2 * 128 * 64 * 32, "lt": 2 * 16 * 256 * 77 * 24,
    "attention": 2 * product, "gradient": 5 * product, "triton_gemm": 2 * 64 * 32 * 16,
  }  # fmt: skip
  assert {name: step.flops for name, step in steps.items() if step.flops} == by_hand
  assert program.flops == sum(by_hand.values())
  assert program.not_counted == {"cub_sort": 1}


# Pallas kernels as libtpu 0.0.42 compiles them; the metadata of splash attention has line breaks.
TPU = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[1,2,512,40], k: bf16[1,2,1024,40]) -> bf16[2,512,128] {
  %q = bf16[1,2,512,40]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[1,2,1024,40]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %l = f32[1,2,512,128]{3,2,1,0:T(8,128)} parameter(2)
  %s = bf16[2,512,128]{2,1,0:T(8,128)(2,1)} parameter(3)
  %m = s8[1,2,2]{2,1,0} parameter(4)
  %jvp_jit_flash_attention__.1 = (bf16[1,2,512,40]{3,2,1,0}, f32[1,2,512,128]{3,2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/jvp(jit(flash_attention))/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzvU","cost_estimate":{"flops":"84934656","transcendentals":"524288"}}}
  %flash_mha_bwd_dkv_block.1 = (bf16[1,2,1024,40]{3,2,1,0}, bf16[1,2,1024,40]{3,2,1,0}) custom-call(%q, %k, %k, %l, %l, /*index=5*/%q, %l), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(jit(flash_attention)))/flash_mha_bwd_dkv_block/pallas_call"}
  %flash_mha_bwd_dq_block.1 = bf16[1,2,512,40]{3,2,1,0} custom-call(%q, %k, %k, %l, %l, /*index=5*/%q, %l), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(jit(flash_attention)))/flash_mha_bwd_dq_block/pallas_call"}
  %splash_mha_fwd.1 = (f32[256,128]{1,0}, bf16[2,512,128]{2,1,0}) custom-call(%m, %m, %s, %s, %s), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/splash_mha_fwd/pallas_call"}
  %splash_mha_dkv.1 = (f32[256,128]{1,0}, bf16[2,2,512,128]{3,2,1,0}, bf16[2,512,128]{2,1,0}, bf16[2,512,128]{2,1,0}) custom-call(%m, %m, %s, %s, %s), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"use_fused_bwd_kernel\\": true}"
}}, metadata={op_name="jit(f)/splash_mha_dkv/pallas_call"}
  %own_kernel.1 = bf16[2,512,128]{2,1,0} custom-call(%s), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/own_kernel/pallas_call"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"12345","bytes_accessed":"1"}}}
  %silent.1 = bf16[2,512,128]{2,1,0} custom-call(%s), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/silent/pallas_call"}
  ROOT %out = bf16[2,512,128]{2,1,0:T(8,128)(2,1)} copy(%s)
}
"""  # noqa: E501


def test_pallas_kernels_of_a_tpu():
  program = hlo.Program(TPU)
  steps = {step.name.split(".")[0]: step for step in program.steps}
  flash, splash = 2 * 2 * 512 * 1024 * 40, 2 * 2 * 512 * 512 * 128  # one product
  by_hand = {
    "jvp_jit_flash_attention__": 2 * flash, "flash_mha_bwd_dkv_block": 4 * flash,
    "flash_mha_bwd_dq_block": 3 * flash, "splash_mha_fwd": 2 * splash,
    "splash_mha_dkv": 5 * splash,  # fused: it returns three gradients
    "own_kernel": 12345,
  }  # fmt: skip
  assert {name: step.flops for name, step in steps.items() if step.flops} == by_hand
  assert program.not_counted == {"tpu_custom_call": 1}
  assert steps["out"].bytes  # what comes after the line breaks is read
  # In time they count at the width to which they pad heads, 128 and on v6e 256.
  for chip, padded in ((chips.find("v5e"), 128), (chips.find("v6e"), 256)):
    seconds = 0
    for name, flops in by_hand.items():
      width = 40 if "flash" in name else 128
      compute = flops * padded / width / (0.8 * chip.flops) if name != "own_kernel" else 0
      seconds += max(compute, steps[name].bytes / (0.9 * chip.bandwidth))
      assert "flash" not in name or compute * 0.9 * chip.bandwidth > steps[name].bytes
    assert make_estimate(program, chip).products == pytest.approx(seconds)


# The model's FLOPs.


def test_a_functions_flops_by_hand():
  def f(a, b):
    def body(c, _):
      return jnp.tanh(c @ b), c @ b.T  # the second is never used

    c, _ = jax.lax.scan(body, a, None, length=5)  # [6, 32] x [32, 32]
    c = jax.lax.cond(c[0, 0] > 0, lambda c: c @ b, lambda c: c @ b @ b, c)
    image = jax.jit(jnp.reshape, static_argnums=1)(c, (1, 8, 8, 3))
    return jax.lax.conv_general_dilated(
      image, jnp.ones((3, 3, 1, 6)), (1, 1), "SAME", feature_group_count=3,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((6, 32), (32, 32))]
  product, convolution = 2 * 6 * 32 * 32, 2 * 22**2 * 6  # 8 x 3 pairs, less the padding's two
  assert model_flops(f, *shapes) == (5 + 2) * product + convolution
  loss = lambda a, b: jnp.sum(f(a, b) ** 2)  # noqa: E731
  # A gradient to both operands of a product; to the image alone, which has an input of the filter.
  assert model_flops(jax.grad(loss, (0, 1)), *shapes) == 3 * 7 * product + 2 * convolution
  # jax.checkpoint works again, and is counted: a plain step has none.
  again = jax.value_and_grad(jax.checkpoint(loss), (0, 1))
  again = jaxpr_flops(jax.make_jaxpr(again)(*shapes))
  assert again == 4 * 7 * product + 3 * convolution


def test_kernels_must_not_be_counted_as_nothing():
  from jax.experimental import pallas as pl

  def copy(x_ref, o_ref):
    o_ref[...] = x_ref[...]

  kernel = pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), interpret=True)
  with pytest.raises(ValueError, match="pallas_call"):
    model_flops(kernel, jnp.ones((8, 8)))


SAVING = dict(
  train__remat_unet=("full",), train__remat_text="dots", train__grad_accum_steps=2,
  objective__contrast="tiled",
)  # fmt: skip


def test_what_saves_memory_changes_no_model_flops(tiny_folder):
  """Both steps have one plain form; that it is the plan's and the log's is tested below."""
  contexts = []
  for changes in ({}, SAVING):
    context, *_ = _build(tiny.tiny_config(tiny_folder, **changes))
    contexts.append(plain_context(context))
  first, second = contexts
  assert first.config == second.config and first.definition == second.definition
  assert first.config.train.remat_unet == ("none",) and first.config.train.grad_accum_steps == 1


@pytest.mark.slow
def test_rematerialisation_raises_hfu_and_leaves_mfu(tiny_folder, quick_compile):
  found = []
  for changes in ({}, SAVING):
    config = tiny.tiny_config(tiny_folder, **changes)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1),
                             ("data", "fsdp", "tensor"))  # fmt: skip
    program = train_program(config, mesh)
    compiled = program.function.lower(*program.arguments).compile()
    log = SimpleNamespace(say=print, program=lambda *numbers: found.append(numbers))
    context, *_ = _build(config)
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    mesh = SimpleNamespace(devices=np.asarray([device], object), size=1)
    measure_utilisation(log, context, mesh, compiled, program.arguments)
    assert found[-1][0] == model_flops(program.plain, *program.arguments)
  (model, compiled, peak), (model_again, compiled_again, _) = found
  assert model == model_again and peak == 989.4e12
  assert compiled == pytest.approx(model, rel=0.05) and compiled_again > 1.2 * compiled


class State(NamedTuple):
  trainable: Any


def test_the_log_gets_both(monkeypatch):
  devices = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 2
  mesh, found, said = SimpleNamespace(devices=np.asarray(devices, object), size=2), [], []
  log = SimpleNamespace(program=lambda *numbers: found.append(numbers), say=said.append)
  product = lambda weights, state, _: state.trainable @ weights  # noqa: E731
  monkeypatch.setattr(utilisation, "train_step", product)
  monkeypatch.setattr(utilisation, "plain_context", lambda _: jnp.ones((8, 4)))
  arguments = (State(jnp.ones((6, 8))), None)
  measure_utilisation(log, None, mesh, SimpleNamespace(as_text=lambda: GPU), arguments)
  assert found == [(2 * 6 * 8 * 4 / 2, hlo.Program(GPU).flops, 989.4e12)]
  assert said[1] == "hfu does not count 1 calls of cub_sort"

  def refuse(*_):
    raise ValueError("the FLOPs of pallas_call are not in the jaxpr")

  with monkeypatch.context() as patch:  # a kernel that stays in the plain step ends no run
    patch.setattr(utilisation, "train_step", refuse)
    measure_utilisation(log, None, mesh, SimpleNamespace(as_text=lambda: GPU), arguments)
  assert found.pop() == (None, hlo.Program(GPU).flops, 989.4e12)
  assert said[2].startswith("no mfu: the FLOPs of pallas_call")
  mesh.devices[0] = SimpleNamespace(device_kind="cpu")
  measure_utilisation(log, None, mesh, None, arguments)
  assert len(found) == 1
