"""The log line of the largest parts of a step: from a trace and the program's source lines."""

import contextlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from flax import nnx

from cc_jax.models.layers import ResnetBlock2D
from cc_jax.plan import hlo
from cc_jax.plan.stack_frames import StackFrames
from cc_jax.training import step_parts
from cc_jax.training.step_parts import Profile, largest_parts, make_profile, read_trace

# As jaxlib 0.10.2 prints them: the id of a frame's parent is one too large.
HEAD = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/x/cc_jax/training/step.py"
2 "/x/cc_jax/customcontrast/model.py"
3 "/x/cc_jax/models/unet.py"
4 "/x/cc_jax/models/layers.py"
5 "/x/flax/nnx/nn/linear.py"
6 "/x/cc_jax/training/optimizer.py"

FunctionNames
1 "train_step"
2 "CustomContrast.predict"
3 "UNet2DCondition.__call__"
4 "ResnetBlock2D.__call__"
5 "Conv.__call__"
6 "apply_update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=57 end_line=59 column=30 end_column=5}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=3 end_column=5}
3 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=3 end_column=5}
4 {file_name_id=4 function_name_id=4 line=9 end_line=9 column=3 end_column=5}
5 {file_name_id=5 function_name_id=5 line=9 end_line=9 column=3 end_column=5}
6 {file_name_id=6 function_name_id=6 line=9 end_line=9 column=3 end_column=5}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}
5 {file_location_id=5 parent_frame_id=5}
6 {file_location_id=6 parent_frame_id=2}

"""
PROGRAM = HEAD + """\
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %v = f32[8]{0} get-tuple-element(%s), index=1
  %sin.1 = f32[8]{0} sine(%v), metadata={op_name="jit(step)/jvp()/conv" stack_frame_id=5}
  ROOT %t = (s32[], f32[8]{0}) tuple(%n, %sin.1)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %cos.2 = f32[8]{0} cosine(%a), metadata={op_name="jit(step)/transpose(jvp())/conv" stack_frame_id=5}
  %add.3 = f32[8]{0} add(%cos.2, %a), metadata={op_name="jit(step)/add" stack_frame_id=6}
  %sum = f32[8]{0} all-reduce(%add.3), replica_groups={}, to_apply=%add
  %tuple = (s32[], f32[8]{0}) tuple(%zero, %sum)
  %while.4 = (s32[], f32[8]{0}) while(%tuple), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %b = f32[8]{0} get-tuple-element(%while.4), index=1
  ROOT %copy.5 = f32[8]{0} copy(%b)
}
"""  # noqa: E501


def test_source_lines():
  frames = StackFrames(HEAD)
  assert [function for _, function in frames.stack(5)] == [
    "Conv.__call__", "ResnetBlock2D.__call__", "UNet2DCondition.__call__", "CustomContrast.predict",
    "train_step",
  ]  # fmt: skip
  assert [file[-12:] for file, _ in frames.stack(6)] == ["optimizer.py", "ning/step.py"]
  assert frames.stack(7) == frames.stack(0) == StackFrames("HloModule m").stack(1) == []
  # Another version may print the parent's own id.
  plain = re.sub(r"(?<=parent_frame_id=)\d+", lambda m: str(int(m[0]) - 1), HEAD)
  assert all(StackFrames(plain).stack(id_) == frames.stack(id_) for id_ in range(8))


def plane(name: str, lines: dict[str, dict[str, int]], stat: bool) -> str:
  """A plane of an XSpace in text; operation -> nanoseconds. With `stat` events name kernels."""
  names = list(dict.fromkeys(name for events in lines.values() for name in events))
  text = f'planes {{ name: "{name}" '
  for id_, operation in enumerate(names, 1):
    shown = f"kernel_{id_}" if stat else f"%{operation} = f32[8] something(%x)"
    text += f'event_metadata {{ key: {id_} value {{ id: {id_} name: "{shown}" }} }} '
  text += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } '
  for line, events in lines.items():
    text += f'lines {{ name: "{line}" '
    for operation, nanoseconds in events.items():
      label = f'stats {{ metadata_id: 1 str_value: "{operation}" }} ' if stat else ""
      id_ = names.index(operation) + 1
      text += f"events {{ metadata_id: {id_} duration_ps: {1000 * nanoseconds} {label} }} "
    text += "} "
  return text + "} "


TIMES = {"cos.2": 400, "sin.1": 300, "while.4": 350, "add.3": 200, "sum": 60, "copy.5": 40}
TPU = plane("/host:CPU", {"python": {"sin.1": 9000}}, True) + "".join(
  plane(f"/device:TPU:{i}", {"Steps": {"sin.1": 5000}, "XLA Ops": TIMES}, False) for i in (0, 1)
)
GPU = plane("/device:GPU:0", {"Stream #1": TIMES | {"other": 9000}, "Stream #2": {"sum": 0}}, True)


@pytest.mark.parametrize("trace", [TPU, GPU], ids=["tpu", "gpu"])
def test_largest_parts_of_a_trace(trace, tmp_path):
  data = jax.profiler.ProfileData.text_proto_to_serialized_xspace(trace)
  folder = tmp_path / "plugins" / "profile" / "now"
  folder.mkdir(parents=True)
  (folder / "vm.xplane.pb").write_bytes(data)
  seconds = read_trace(tmp_path)
  assert seconds["cos.2"] == pytest.approx(400e-9)
  # Without the loop, of which sin.1 is the body: 1000 ns.
  program = hlo.Program(PROGRAM)
  assert largest_parts(program, seconds) == (
    "largest parts of a step: UNet2DCondition ResnetBlock2D backward 40%, "
    "UNet2DCondition ResnetBlock2D forward 30%, optimizer.apply_update 20%"
  )
  assert largest_parts(program, {"sum": 3.0, "copy.5": 1.0}) == (
    "largest parts of a step: all-reduce 75%, copy 25%"
  )
  assert largest_parts(program, {"unknown": 1.0}) == ""


class Log:
  def __init__(self):
    self.said, self.spent_on = [], []

  def say(self, line):
    self.said.append(line)

  @contextlib.contextmanager
  def spent(self, on):
    self.spent_on.append(on)
    yield


def test_a_trace_of_this_machine(tmp_path):
  block = ResnetBlock2D(8, 8, temb_channels=4, groups=2, epsilon=1e-5, rngs=nnx.Rngs(0))
  definition, params = nnx.split(block)

  def loss(params, x):
    return jnp.sum(nnx.merge(definition, params)(x, jnp.ones((2, 4))) ** 2)

  x, log = jnp.ones((2, 16, 16, 8)), Log()
  step = jax.jit(jax.grad(loss)).lower(params, x).compile()
  profile = Profile(log, tmp_path / "profile", (2, 3))
  profile.program = lambda: hlo.Program(step.as_text())
  for number in range(1, 5):
    profile.before(number)
    profile.after(number, step(params, x))
  (line,) = log.said
  assert line.startswith("largest parts of a step: ") and "ResnetBlock2D backward" in line
  assert set(log.spent_on) == {"tracing"} and list((tmp_path / "profile").rglob("*.xplane.pb"))
  profile.close()
  assert len(log.said) == 1


def test_no_run_fails_because_of_its_trace(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))

  def refuse(*_, **__):
    raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

  with monkeypatch.context() as patch:
    patch.setattr(jax.profiler, "start_trace", refuse)
    profile = Profile(Log(), None, (1, 2))
    for number in (1, 2, 3):
      profile.before(number)
      profile.after(number, None)
  assert "CUPTI_ERROR" in warnings[0]
  log = Log()
  profile = Profile(log, None, (1, 1))
  profile.program = refuse
  profile.before(1)
  profile.after(1, jnp.zeros(()))
  assert log.said == [] and "CUPTI_ERROR" in warnings[-1]


def test_which_steps_are_traced(monkeypatch):
  log, made = Log(), lambda *args: make_profile(log, SimpleNamespace(), *args)  # noqa: E731
  assert (made((0, 0), 10)._first, made((0, 0), 10)._last) == (0, 0)  # a CPU
  monkeypatch.setattr(step_parts.jax, "default_backend", lambda: "gpu")
  profile = made((0, 0), 10)
  assert (profile._first, profile._last, profile._folder) == (13, 14, None)
