"""benchmarks/gpu.sh: what it runs, skips and ends, with a Python that only notes its calls; and all
of it once at a few pixels, so that no minute on a GPU is lost to a typing error."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for `benchmarks`, which is no package that is installed

FAKE = """#!/usr/bin/env bash
# Stands for python3: diffusers is missing, `correct` takes too long, `train` fails.
case "$*" in
  "-c import diffusers") exit 1 ;;
  -c*) ;;
  *benchmarks.gpu.record*) exec {python} "$@" ;;
  *gpu.check*) {check} ;;
  *gpu.correctness*) sleep 30 ;;
  *gpu.train_ours*) echo "some words" >&2; echo "ValueError: wrong" >&2; exit 1 ;;
  *) echo "ran $*" ;;
esac
"""


def run(tmp_path, *arguments, check="exit 0", **environment):
  fake = tmp_path / "python"
  fake.write_text(FAKE.format(python=sys.executable, check=check))
  fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
  return subprocess.run(
    [ROOT / "benchmarks" / "gpu.sh", f"--out={tmp_path}", *arguments], capture_output=True,
    text=True, env=os.environ | {"PYTHON": str(fake)} | environment)


def lines(tmp_path):
  return [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]


def test_parts_are_run_skipped_and_reported(tmp_path):
  result = run(tmp_path, "--parts=rate,train,peer-train,sample-sdxl")
  assert result.returncode == 0, result.stderr
  ran = [line for line in result.stdout.splitlines() if line.startswith("ran")]
  assert "ran -m benchmarks.gpu.product_rate" in ran
  assert "ran -m benchmarks.gpu.sample_ours --base=sdxl" in ran
  assert not any("train_torch" in line or "sample_torch" in line for line in ran)
  assert lines(tmp_path) == [
    {"part": "train", "failed": "ValueError: wrong"},
    {"part": "peer-train", "skipped": "no Python module diffusers"},
  ]


def test_a_part_ends_with_the_time_and_the_next_is_skipped(tmp_path):
  script = (ROOT / "benchmarks" / "gpu.sh").read_text()
  short = tmp_path / "benchmarks" / "gpu.sh"  # with a second for `correct`, and none for the rest
  short.parent.mkdir()
  short.write_text(script.replace("part correct 70", "part correct 1")
                   .replace("limit=$((60 * minutes))", "limit=10"))
  short.chmod(0o755)
  (tmp_path / "benchmarks" / "gpu").symlink_to(ROOT / "benchmarks" / "gpu")
  fake = tmp_path / "python"
  fake.write_text(FAKE.format(python=sys.executable, check="exit 0"))
  fake.chmod(0o755)
  subprocess.run([short, f"--out={tmp_path}", "--parts=correct,sample-sd15"], check=True,
                 capture_output=True, env=os.environ | {"PYTHON": str(fake)})
  assert lines(tmp_path) == [
    {"part": "correct", "ended": "after its 1 s"},
    {"part": "sample-sd15", "skipped": "no time left of 9 minutes"},
  ]


@pytest.mark.parametrize("arguments, check, words", [
  (["--tinny"], "exit 0", "error: unknown argument --tinny"),
  (["--minutes=ten"], "exit 0", "error: --minutes=ten is no whole number"),
  (["--wheels=/none"], "exit 0", "error: no wheel in --wheels=/none"),
  ([], "echo JAX sees no GPU; exit 1", "error: JAX sees no GPU"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, arguments, check, words):
  result = run(tmp_path, *arguments, check=check)
  assert result.returncode == 1
  assert result.stderr.startswith(words) and result.stderr.count("\n") == 1


def test_the_tables_say_what_was_measured_and_what_not():
  """Shares by hand: 50 images/s of 2,000 GFLOP are 100 TFLOP/s, a quarter of 400."""
  from benchmarks.gpu.summary import text

  rate = {"part": "rate", "device": "Card", "side": 8192, "jax": "1", "tflops": 400.0}
  words = text([
    rate,
    {"part": "model-flops", "gflops_an_image": 2000.0},
    {"part": "train", "who": "cc_jax", "batch": 8, "images_a_second": 50.0, "peak_gib": 12.25},
    {"part": "train", "who": "cc_jax", "batch": 16, "does_not_fit": True},
    {"part": "train", "profile": "a step", "device_seconds": 1.0, "kinds": {"product": 0.75},
     "kernels": {"gemm": 0.5}},
    {"part": "correct", "what": "a", "ok": True, "error": 1e-4, "limit": 1e-3},
    {"part": "correct", "what": "b", "ok": False, "error": float("nan"), "limit": 1e-3},
    {"part": "correct", "what": "c", "skipped": "needs a TPU"},
    {"part": "peer-train", "skipped": "no Python module diffusers"},
  ], "Card", rate)
  assert "400.0 TFLOP/s" in words
  assert "| cc_jax | 8 | 50.0 | 12.2 | 25.0 % |" in words
  assert "| cc_jax | 16 | does not fit |" in words
  assert "| `product` | 75.0 % |" in words and "| `gemm` | 50.0 % |" in words
  assert "1 checks hold, 1 do not." in words and "| c |  |  | needs a TPU |" in words
  assert "- peer-train: skipped no Python module diffusers" in words


@pytest.mark.parametrize("most_that_fits, tried", [
  (100, [4, 16, 64, 256, 128]), (40, [4, 16, 64, 32]), (3, [4]), (1000, [4, 16, 64, 256]),
])  # fmt: skip
def test_batches_grow_until_one_does_not_fit(most_that_fits, tried):
  from benchmarks.gpu.sizes import growing_batches

  batches = []
  growing_batches(4, 256, lambda batch: batches.append(batch) or batch <= most_that_fits)
  assert batches == tried


def test_attention_in_float64_is_its_own_derivative():
  """The reference of the attention kinds, against differences of itself."""
  from benchmarks.gpu.correctness import exact_attention

  rng = np.random.default_rng(0)
  q, g = rng.standard_normal((2, 1, 3, 2, 4))
  k, v = rng.standard_normal((2, 1, 5, 2, 4))
  _, *gradients = exact_attention(q, k, v, g)
  for which, gradient in enumerate(gradients):
    given = [q.copy(), k.copy(), v.copy()]
    index = (0, 1, 1, 2)
    values = []
    for change in (1e-6, -1e-6):
      moved = [x.copy() for x in given]
      moved[which][index] += change
      values.append(np.sum(exact_attention(*moved, g)[0] * g))
    assert abs((values[0] - values[1]) / 2e-6 - gradient[index]) < 1e-6


@pytest.mark.slow
def test_everything_runs_at_a_few_pixels(tmp_path):
  environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(
    [ROOT / "benchmarks" / "gpu.sh", "--tiny", "--minutes=40", f"--out={tmp_path}"],
    env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-3000:]
  rows = lines(tmp_path)
  assert not [row for row in rows if "failed" in row or row.get("ok") is False]
  measured = {(row["part"], row["who"]) for row in rows if "who" in row}
  assert measured >= {
    ("train", "cc_jax"), ("train", "PyTorch, eager"), ("train", "PyTorch, compiled"),
    *((f"sample-{base}", who) for base in ("sd15", "sdxl")
      for who in ("cc_jax", "diffusers, eager", "diffusers, compiled")),
  }  # fmt: skip
  words = (tmp_path / "cpu-tiny.md").read_text()
  assert "These numbers say nothing" in words and "share of the product rate" in words
  assert {"model-flops", "rate", "correct"} <= {row["part"] for row in rows}
