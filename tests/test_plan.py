"""The plan: what is read in compiled programs, and what lies on a chip.

What needs several devices runs in a process of its own (run_plan.py).
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import run_plan

from cc_jax.errors import UserError
from cc_jax.plan import __main__ as plan
from cc_jax.plan import chips, hlo
from cc_jax.plan.batch_search import largest_batch
from cc_jax.plan.collectives import KINDS, Collective, by_kind, group_size
from cc_jax.plan.estimate import Overflow, all_bytes, make_estimate, make_plan, read_overflow
from cc_jax.plan.lower import make_program
from cc_jax.plan.report import describe_plan, describe_refusal, state_table
from cc_jax.plan.topology import Slice, find_slice, parse_topology
from configs import subjects3d

ROOT = Path(__file__).parent.parent


# Reading programs.


def test_products_convolutions_loops_and_remat_by_hand():
  """Value and gradient of: five products in a loop, computed again in the gradient; a convolution
  with stride; products of a batch."""

  def loss(w, kernel, x):
    def body(c, _):
      return jnp.tanh(c @ w), None

    c, _ = jax.lax.scan(jax.checkpoint(body), x, None, length=5)  # [6, 32]
    image = c.reshape(3, 8, 8, 1) * jnp.ones(2)
    y = jax.lax.conv_general_dilated(
      image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # [3, 4, 4, 7]
    y = y.reshape(3, 16, 7)
    return jnp.sum(jnp.einsum("bsi,bti->bst", y, y) ** 3)  # [3, 16, 16]

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 32), (3, 3, 2, 7), (6, 32))]
  compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
  program = hlo.Program(compiled.as_text())
  iteration = 2 * 6 * 32 * 32
  # One of three rows of the kernel misses the first of four outputs; both gradients go as far.
  convolution = 2 * 3 * (4 + 4 + 3) ** 2 * 2 * 7
  batched = 2 * 3 * 16 * 16 * 7
  # An iteration: forward, again, and to both operands. The image is ones times c: no less work.
  assert program.flops == 5 * 4 * iteration + 3 * convolution + 3 * batched
  assert program.loops_counted_once == set() and program.collectives == []
  # XLA's own count, with all the additions besides, has each loop's body once.
  assert compiled.cost_analysis()["flops"] < program.flops - 2 * 4 * iteration


TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%fused (p0: f32[4,20,130], p1: s32[], p2: bf16[20,130]) -> f32[4,20,130] {
  %p0 = f32[4,20,130]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %p2 = bf16[20,130]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %wide = f32[1,20,130]{2,1,0:T(8,128)} bitcast(%p2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %put = f32[4,20,130]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %wide, %p1, %zero, %zero)
}

%product (q0: bf16[20,130], q1: bf16[130,130]) -> bf16[20,130] {
  %q0 = bf16[20,130]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q1 = bf16[130,130]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[20,130]{1,0:T(8,128)(2,1)} convolution(%q0, %q1), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (r0: f32[64,128]) -> f32[16,128] {
  %r0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,128]{1,0:T(8,128)} all-reduce(%r0), channel_id=3, replica_groups=[4,4]<=[16], to_apply=%add
  %where = s32[]{:T(128)} constant(0)
  ROOT %slice.9 = f32[16,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %where, %where), dynamic_slice_sizes={16,128}
}

%begin (s0: f32[16,128]) -> (f32[16,128], f32[64,128], u32[]) {
  %s0 = f32[16,128]{1,0:T(8,128)} parameter(0)
  %all-gather.5 = f32[64,128]{1,0:T(8,128)} all-gather(%s0), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.5 = (f32[16,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) custom-call(%all-gather.5), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (t0: f32[16,128], t1: f32[128,128]) -> f32[16,128] {
  %t0 = f32[16,128]{1,0:T(8,128)} parameter(0)
  %t1 = f32[128,128]{1,0:T(8,128)} parameter(1)
  %all-gather.6 = f32[64,128]{1,0:T(8,128)} all-gather(%t0), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %convolution.6 = f32[16,128]{1,0:T(8,128)} convolution(%t0, %t1), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[20,130], f32[4,20,130])) -> (s32[], bf16[20,130], f32[4,20,130]) {
  %state = (s32[]{:T(128)}, bf16[20,130]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[4,20,130]{2,1,0:T(8,128)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copy.1 = s32[]{:T(128)S(6)} copy(%i)
  %next = s32[]{:T(128)} add(%copy.1, %one)
  %x = bf16[20,130]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %all = f32[4,20,130]{2,1,0:T(8,128)} get-tuple-element(%state), index=2
  %weights = bf16[130,130]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[20,130]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %weights), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"3000"}}
  %fusion.2 = f32[4,20,130]{2,1,0:T(8,128)} fusion(%all, %copy.1, %fusion.1), kind=kLoop, calls=%fused
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[20,130]{1,0:T(8,128)(2,1)S(1)}, f32[4,20,130]{2,1,0:T(8,128)}) tuple(%next, %fusion.1, %fusion.2)
}

%condition (state.2: (s32[], bf16[20,130], f32[4,20,130])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, bf16[20,130]{1,0}, f32[4,20,130]{2,1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(4)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (a: bf16[20,130], b: f32[64,128]) -> (f32[4,20,130], f32[16,128]) {
  %a = bf16[20,130]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,128]{1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(1)
  %copy.2 = s32[]{:T(128)} copy(%start)
  %near = bf16[20,130]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  %room = f32[4,20,130]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %tuple.2 = (s32[]{:T(128)}, bf16[20,130]{1,0:T(8,128)(2,1)S(1)}, f32[4,20,130]{2,1,0:T(8,128)}) tuple(%copy.2, %near, %room)
  %while.1 = (s32[]{:T(128)}, bf16[20,130]{1,0:T(8,128)(2,1)S(1)}, f32[4,20,130]{2,1,0:T(8,128)}) while(%tuple.2), condition=%condition, body=%body
  %out = f32[4,20,130]{2,1,0:T(8,128)} get-tuple-element(%while.1), index=2
  %gather-start = (f32[16,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) all-gather-start(%slice.0), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=2], device_ids=([4,4]T(1,0)) {'axis_1'}, dimensions={0}
  %slice.0 = f32[16,128]{1,0:T(8,128)} slice(%b), slice={[0:16], [0:128]}
  %fetch-start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]) copy-start(%b)
  %fetch-done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%fetch-start)
  %gather-done = f32[64,128]{1,0:T(8,128)} all-gather-done(%gather-start)
  %fusion.3 = f32[16,128]{1,0:T(8,128)} fusion(%gather-done), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel = f32[16,128]{1,0:T(8,128)} custom-call(%fusion.3), custom_call_target="tpu_custom_call"
  %permute = f32[16,128]{1,0:T(8,128)} collective-permute(%kernel), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %async.1 = (f32[16,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%slice.0), kind=kCustom, calls=%begin
  %square = f32[128,128]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %async.2 = f32[16,128]{1,0:T(8,128)} fusion(%slice.0, %square), kind=kOutput, calls=%async_collective_fusion
  ROOT %tuple.3 = (f32[4,20,130]{2,1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}) tuple(%out, %permute)
}
"""  # noqa: E501


def test_a_tpus_program():
  """In libtpu's words: a loop without its count, tiles, on-chip memory, fused collectives."""
  program = hlo.Program(TPU)
  steps = {step.name: step for step in program.steps}
  # From 1 to 4: a trip count of 3. A product that is written as a convolution.
  assert steps["fusion.1"].runs == 3 and steps["fusion.1"].cycles == 3000
  assert program.flops == 3 * 2 * 20 * 130 * 130 + 2 * 16 * 128 * 128
  # 130 x 130 bf16 in tiles of 8 x 128; input and output are in VMEM.
  assert steps["fusion.1"].bytes == 136 * 256 * 2
  # In place: of 4 x 24 x 256 floats one slice is written, nothing read.
  assert steps["fusion.2"].bytes == 24 * 256 * 4
  assert steps["near"].bytes == 24 * 256 * 2
  assert steps["fetch-start"].bytes == 64 * 128 * 4  # read; written into VMEM
  assert "weights" not in steps and "gather-done" not in steps
  assert by_kind(program.collectives) == {
    "all-gather": (2, 2 * 64 * 128 * 4),  # the one in the background once
    "reduce-scatter": (1, 16 * 128 * 4),
    "collective-permute": (1, 16 * 128 * 4),
  }
  assert {c.kind: c.group for c in program.collectives if c.kind != "collective-permute"} == {
    "all-gather": 4, "reduce-scatter": 4
  }  # fmt: skip
  assert program.not_counted == {"tpu_custom_call": 1} and program.loops_counted_once == set()

  estimate = make_estimate(program, chips.find("v5e"))
  traffic = (2 * 16 + 128) * 128 * 4 / (0.9 * 819e9)  # of async.2: longer than its FLOPs
  assert estimate.products == pytest.approx(3 * 3000 / 1.5e9 + traffic)
  sent = 2 * 64 * 128 * 4 * 3 / 4 + 16 * 128 * 4 * 3 + 16 * 128 * 4
  assert estimate.collectives == pytest.approx(sent / 200e9)
  assert estimate.memory > 24 * 256 * (3 * 4 + 2) / (0.9 * 819e9)
  low, high = estimate.bounds(2)
  assert low < estimate.seconds < high - estimate.collectives

  # libtpu's word for no estimate: the FLOPs at the chip's peak in its place.
  assert TPU.count('"3000"') == 1
  guessed = hlo.Program(TPU.replace('"3000"', f'"{2**63 - 1}"'))
  guessed = make_estimate(guessed, chips.find("v5e"))
  assert 0 < guessed.products < estimate.products

  unknown = hlo.Program(TPU.replace("direction=LT", "direction=NE"))
  assert program.flops - unknown.flops == 2 * 2 * 20 * 130 * 130
  assert unknown.loops_counted_once == {"while.1"}


def test_what_ring_algorithms_send():
  one = {k: Collective(k, 100, 4, 1).sent_bytes() for k in KINDS}
  assert one["all-reduce"] == 150 and one["all-gather"] == one["all-to-all"] == 75
  assert one["reduce-scatter"] == 300 and one["collective-permute"] == 100
  groups = {
    "replica_groups={{0,1},{2,3}}, x": 2,
    "replica_groups=[2,8]<=[16], x": 8,
    "replica_groups=mesh['a'=4,'b'=4], device_ids=([16]) {'a','b'}": 16,
    "replica_groups={}, x": 16,
  }
  assert {text: group_size(text, 16) for text in groups} == groups


def test_what_is_no_program():
  with pytest.raises(UserError, match="no compiled program"):
    hlo.Program("module @jit_step {\n}\n")


# The mini step.


def by_hand(batch: int) -> float:
  """FLOPs of configs/subjects3d.py's training step, layer by layer, per batch.

  A frozen product counts twice where a gradient flows through it (forward, to its input), a trained
  one three times, and attention's two products, whose operands both get one, three times each.
  """
  FORWARD, FROZEN, TRAINED = 1, 2, 3

  def mm(rows, a, b):
    return 2 * rows * a * b

  def conv(side, a, b):  # 3 x 3, padding left out
    return 2 * (3 * side - 2) ** 2 * a * b

  def halve(side, c):
    return 2 * (3 * side // 2 - 1) ** 2 * c * c

  def resnet(side, a, b):
    return conv(side, a, b) + conv(side, b, b) + (mm(side**2, a, b) if a != b else 0)

  def attention(queries, keys, width):
    return 2 * mm(queries, width, keys)

  # VAE, 64 px to 16: widths 16, 32, 64.
  vae = conv(64, 3, 16) + resnet(64, 16, 16) + halve(64, 16) + resnet(32, 16, 32) + halve(32, 32)
  vae += resnet(16, 32, 64) + 2 * resnet(16, 64, 64) + conv(16, 64, 16) + mm(256, 16, 16)

  # Image encoder: 64 patches of 8 x 8 and the CLS token, 4 layers; reference and positive.
  layer = 4 * mm(65, 128, 128) + attention(65, 65, 128) + 2 * mm(65, 128, 512)
  image = 2 * (mm(64, 192, 128) + 4 * layer) + mm(1, 128, 128)

  # Q-Formers, 2 blocks: 17 visual queries; 9 textual ones for each of 4 layers.
  def block(queries, own):
    linear = 2 * mm(queries, 128, 128) + 2 * (mm(65, 128, 128) + mm(queries, 128, 128))
    return linear + attention(queries, 65 + own, 128) + 2 * mm(queries, 128, 512)

  read = 2 * mm(65, 512, 128)  # the features themselves have no gradient
  visual = read + TRAINED * 2 * block(17, 17)
  textual = read + TRAINED * 2 * block(36, 9) + 2 * mm(4, 24, 128) + TRAINED * mm(4, 128, 128)
  # Of every reference, and of "no image" for eight neighbours; positives have textual tokens only.
  fusion = mm(32, 128, 128) + mm(16, 128, 128) + attention(32, 16, 128)
  rows = 1 + 1 / 8
  encoder = rows * (visual + textual + TRAINED * (fusion + mm(8, 128, 128))) + textual

  # Text encoder: 4 sequences with S+, 32 tokens, 2 layers.
  linear = 4 * mm(32, 128, 128) + 2 * mm(32, 128, 512)
  text = 4 * 2 * (FROZEN * linear + TRAINED * attention(32, 32, 128))

  # UNet: 48 channels at 16 x 16, 128 at 8 x 8; time embedding 192, with the part of the mean text.
  temb = FORWARD * (mm(1, 48, 192) + mm(1, 192, 192))
  temb += FROZEN * (2 * mm(33, 128, 128) + mm(1, 128, 128) + mm(1, 128, 192))
  temb += FROZEN * (mm(1, 192, 48) * 3 + mm(1, 192, 128) * 5) + TRAINED * attention(1, 33, 128)
  first = FORWARD * (conv(16, 8, 48) + conv(16, 48, 48))  # nothing before needs a gradient
  rest = conv(16, 48, 48) + halve(16, 48) + resnet(8, 48, 128) + 2 * resnet(8, 128, 128)
  rest += resnet(8, 256, 128) + resnet(8, 176, 128) + conv(16, 128, 128)
  rest += resnet(16, 176, 48) + resnet(16, 96, 48) + conv(16, 48, 8)
  frozen = 2 * mm(64, 128, 128) + 4 * mm(64, 128, 128) + 2 * mm(64, 128, 128)  # in, out, self, q, o
  frozen += 2 * mm(32, 128, 128) + mm(64, 128, 1024) + mm(64, 512, 128)
  scores = attention(64, 64, 128) + attention(64, 32, 128) + attention(64, 8, 128)
  own = 2 * mm(8, 128, 128) + mm(64, 128, 32) + mm(1, 192, 32) + mm(64, 32, 1)
  transformer = FROZEN * frozen + TRAINED * (scores + own)
  unet = temb + first + FROZEN * rest + 4 * transformer

  # The subject's mask, 64 to 16; similarities and both losses, with every sample of the batch.
  mask = mm(64, 64, 16) + mm(16, 64, 16)
  contrast = mm(1, 128, batch) + TRAINED * (mm(1, 128, batch) + 4 * mm(1, 128, batch))
  return batch * (vae + image + encoder + text + unet + mask + contrast)


@pytest.fixture(scope="module")
def mini(quick_compile):
  """The mini step, compiled for one device."""
  config = subjects3d.get_config()
  config.train.batch_size = 8
  config.mesh.data = 1
  slice_ = Slice(jax.devices()[:1], chips.find("v5e"), (1,))
  program = make_program(config, slice_, "train", 0)
  return make_plan(program, slice_), program


def test_flops_of_the_mini_step_by_hand(mini):
  program = mini[0].program
  assert program.flops == pytest.approx(by_hand(8), rel=0.05)
  assert not program.loops_counted_once and not program.not_counted
  # The model's own: no strips, no padding, nothing that XLA adds.
  assert mini[0].model_flops == pytest.approx(by_hand(8), rel=1e-3)


def test_the_plan_in_numbers_and_words(mini):
  result, program = mini
  numbers = json.loads(json.dumps(result.numbers()))
  memory = numbers["memory"]
  taken = result.compiled.memory_analysis().argument_size_in_bytes
  assert taken == result.program.argument_bytes and memory["padding"] == 0  # a CPU has no tiles
  decoder = all_bytes({k: v for k, v in program.parts["frozen base"].items() if "decoder" in k})
  held = sum(memory["parts"].values()) - memory["parts"]["next batch"]  # which is no argument
  assert taken + decoder <= held < taken + 1.2 * decoder
  trained = all_bytes(program.parts["adapter"])
  assert memory["parts"]["Adam"] == 2 * trained + 4 and memory["parts"]["average"] == trained
  assert memory["temporaries"] > trained  # the gradients alone
  assert memory["total"] > memory["temporaries"] + sum(memory["parts"].values())
  assert numbers["images_per_second"] == pytest.approx(8 / numbers["seconds"])
  hours = numbers["chip_hours_per_million_images"]
  assert hours * 3600 * numbers["images_per_second_per_chip"] == pytest.approx(1e6)
  assert 0 < numbers["mfu"] < 1 and 0 < numbers["hfu"] < 1
  assert numbers["mfu"] / numbers["hfu"] == pytest.approx(result.model_flops / numbers["flops"])

  text = describe_plan(result, "train")
  for word in ("frozen base", "EMA", "no collectives", "chip-hours", "docs.cloud.google.com"):
    assert word in text
  table = state_table(program)
  assert "gradients" in table and f"{trained / 1e9:.4g}" in table


# The largest batch.


def test_the_largest_batch_by_two_compiles_and_a_third():
  asked = []

  def need(batch):
    asked.append(batch)
    return 3 + 0.5 * batch

  search = largest_batch(32, need(32), 10.1, need)
  assert search.largest == 14 and asked == [32, 16, 14]
  # A line that promises too much is drawn again.
  bent = {16: 14.0, 8: 8.5, 12: 10.5, 11: 10.2, 10: 9.9}
  search = largest_batch(16, bent[16], 10.0, bent.__getitem__)
  assert search.largest == 10 and search.tried[10] <= 10
  # One that promises less than was seen to fit changes nothing.
  bent = {16: 12.0, 8: 9.99}
  assert largest_batch(16, bent[16], 10.0, bent.__getitem__).largest == 8
  # A refusal without a number: halves.
  search = largest_batch(16, math.nan, 10.0, lambda b: math.nan if b > 5 else float(b))
  assert search.largest in (4, 5)
  assert largest_batch(4, 40.0, 10.0, lambda b: 20.0 + b).largest == 0
  assert largest_batch(1, 40.0, 10.0, need).largest == 0


def test_the_compilers_refusal():
  text = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.30G of 15.75G hbm. Exceeded hbm capacity by 4.55G."
  )
  refusal = read_overflow(text, chips.find("v5e"))
  assert refusal == (20.30 * 2**30, 15.75 * 2**30)
  text = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(139.06G) exceeds available HBM (95.74G)."
  )
  assert read_overflow(text, chips.find("v5p")) == (139.06 * 2**30, 95.74 * 2**30)
  assert math.isnan(read_overflow("RESOURCE_EXHAUSTED: no", chips.find("v5e")).needed)
  assert read_overflow("INTERNAL: a bug", chips.find("v5e")) is None
  said = describe_refusal(
    {
      "images_per_chip": 8,
      "memory": {"total": refusal.needed, "chip": refusal.limit},
      "tried": {"8": refusal.needed},
      "largest_images_per_chip": 3,
    },
    Slice((None,) * 4, chips.find("v5e"), (2, 2)),
  )
  assert "20.30 GiB of 15.75" in said and "--batch_per_chip=3" in said


def test_what_does_not_fit_ends_with_1_and_the_largest_batch(monkeypatch, capsys):
  slice_ = Slice((None,) * 16, chips.find("v5e"), (4, 4))
  settings = dict(config=subjects3d.get_config(), what="train", topology="v5e:4x4", suggest=False)
  settings |= dict(batch_per_chip=8, json=True)
  gib = 2**30

  def make_plan(program, slice_):
    needed = (3 + 2 * program.images // 16) * gib
    if needed > slice_.chip.memory:
      return Overflow(needed, 15.75 * gib)
    return SimpleNamespace(memory=SimpleNamespace(total=needed), chip=slice_.chip)

  monkeypatch.setattr(plan.flags, "FLAGS", SimpleNamespace(**settings))
  monkeypatch.setattr(plan, "find_slice", lambda *a: slice_)
  monkeypatch.setattr(
    plan, "make_program", lambda config, slice_, what, batch: SimpleNamespace(images=16 * batch)
  )
  monkeypatch.setattr(plan, "make_plan", make_plan)
  with pytest.raises(SystemExit) as end:
    plan.main([])
  refusal = json.loads(capsys.readouterr().out)
  assert end.value.code == 1 and not refusal["fits"] and refusal["largest_images_per_chip"] == 6
  assert refusal["tried"].keys() == {"8", "4", "6"} and refusal["memory"]["total"] == 19 * gib
  plan.flags.FLAGS.batch_per_chip = -1
  with pytest.raises(UserError, match="must be at least 1"):
    plan.main([])


def test_topologies():
  assert parse_topology("v5p:2x2x4") == (chips.find("v5p"), (2, 2, 4))
  assert chips.find("TPU v6 lite") is chips.find("v6e")
  for wrong in ("v5e", "v5e:4", "v7:4x4", "h100:8x1", "v5e:4x", ""):
    with pytest.raises(UserError, match="is no slice; write one of v4, v5e, v5p, v6e"):
      parse_topology(wrong)


# (slice, its devices, their hosts): smaller than a host of 2 x 2; a v4, whose cores are joined.
SLICES = [("v5e:1x1", 1, 1), ("v6e:1x1", 1, 1), ("v5e:1x2", 2, 1), ("v5p:1x1x1", 1, 1),
          ("v4:2x2x1", 4, 1), ("v4:2x2x2", 8, 2), ("v5e:2x4", 8, 2)]  # fmt: skip


@pytest.mark.parametrize("name, devices, hosts", SLICES)
def test_slices_of_all_sizes(name, devices, hosts, monkeypatch):  # P28
  """As libtpu 0.0.42 answers; where it is not installed, a stand-in refuses what it refuses."""
  from jax.experimental import topologies

  def stand_in(
    topology_name="", platform="", *, chips_per_host_bounds=(2, 2, 1), chip_config_name=""
  ):
    sides = [int(side) for side in topology_name.split(":")[1].split("x")]
    if any(side % host for side, host in zip(sides, chips_per_host_bounds)):
      raise RuntimeError("Topology layout is not divisible by chips_per_host_bounds")
    cores = 2 if topology_name.startswith("v4") and chip_config_name != "megacore" else 1
    count, host = math.prod(sides) * cores, math.prod(chips_per_host_bounds)
    chips_ = [SimpleNamespace(process_index=n // host) for n in range(count)]
    return SimpleNamespace(devices=chips_)

  if importlib.util.find_spec("libtpu") is None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(topologies, "get_topology_desc", stand_in)
  found = find_slice(name, "float32").devices
  assert len(found) == devices and len({device.process_index for device in found}) == hosts


def test_a_slice_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match="v5e:1x1 needs libtpu.*pip install"):
    find_slice("v5e:1x1", "float32")


# Several devices.


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory):
  out = tmp_path_factory.mktemp("plan") / "out.json"
  script = Path(run_plan.__file__)
  done = subprocess.run(
    [sys.executable, script, tiny_folder, out], capture_output=True, text=True, timeout=500
  )
  assert done.returncode == 0, done.stderr
  return json.loads(out.read_text())


@pytest.mark.slow
def test_only_the_contrastive_keys_grow_with_the_chips(found):
  """Output bytes of collectives a chip, of the step on 4 and on 8 devices, one image each."""
  few, many, keys = found["data 4"], found["data 8"], found["keys of a sample"]
  assert few["all-reduce"] > found["trained bytes"]  # the gradients' sum
  growth = {kind: size - few.get(kind, 0) for kind, size in many.items()}
  # The keys of four more samples are gathered, once by each loss, and their gradients sent back.
  assert 4 * keys / 2 <= growth["all-gather"] <= 2 * 4 * keys, growth
  assert sum(abs(size) for size in growth.values()) <= 4 * 4 * keys, growth


@pytest.mark.slow
def test_generation_and_a_run_on_this_machine(found):
  generate = found["generate"]
  assert generate["images"] == 8 and generate["fits"]
  by_trip_count = {float(runs): flops for runs, flops in generate["flops by trip count"].items()}
  assert generate["flops"] == sum(runs * flops for runs, flops in by_trip_count.items())
  # Most of the work is in the sampler's loop of 4 steps.
  assert max(by_trip_count, key=by_trip_count.get) == 4
  measured = found["measured"]
  assert measured["seconds"] > 0
  assert f"{measured['seconds']:.4g} s; the estimate" in measured["text"]


def test_the_command():
  """Refuses nonsense in one line."""
  command = [sys.executable, "-m", "cc_jax.plan", "--topology=v9:2x2"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 1 and "is no slice" in done.stderr and "Traceback" not in done.stderr


# For TPUs, where libtpu is.


def test_the_mini_step_lowers_for_a_slice():
  pytest.importorskip("libtpu")
  slice_ = find_slice("v5e:4x4", "float32")
  program = make_program(subjects3d.get_config(), slice_, "train", 2)
  assert program.chips == 16 and program.images == 32
  text = program.function.lower(*program.arguments).as_text()
  assert "num_partitions = 16" in text


@pytest.mark.slow
@pytest.mark.parametrize("name, topology, batch, overrides", run_plan.FULL)
def test_full_plans(name, topology, batch, overrides):
  """Each takes minutes and gigabytes, in a process of its own. docs/scale.md has their outputs."""
  pytest.importorskip("libtpu")
  command = [sys.executable, "-m", "cc_jax.plan", f"--config=configs/{name}.py", "--json"]
  command += [f"--topology={topology}", f"--batch_per_chip={batch}", *overrides]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stdout + done.stderr
  assert json.loads(done.stdout)["fits"]
