#!/usr/bin/env bash
# Everything that has to be known about one CUDA GPU, in at most 9 minutes.
#
#   benchmarks/gpu.sh [--out=DIR] [--wheels=DIR] [--minutes=9] [--parts=rate,correct,...] [--tiny]
#
# Parts in order of worth; each has a budget of seconds (in proportion to --minutes), is ended when
# it is over, and the next one goes on. What is missing (torch, diffusers, time) is said and skipped.
# Every number is written as it comes: one JSON object a line in DIR/gpu.jsonl, and after each part
# the tables in DIR/<device>.md. DIR is $OUT, else benchmarks/results.
#
# It has run with --tiny on a CPU alone so far, never on a GPU: no machine with one was at hand.
#
#   rate       bf16 products of 8192 x 8192: the denominator of "share of the measured product rate"
#   correct    attention kinds, a bf16 step, losses against float64 on the CPU
#   train      our step: SD 1.5 adapter training at 512 px, batches 4, 16, 64, ... until memory is
#              full, then half of what did not fit, and a profile of the largest one as a table
#   peer-train the same in PyTorch: diffusers' UNet with IP-Adapter's attentions and Resampler
#   sample-sd15, peer-sample-sd15, sample-sdxl, peer-sample-sdxl
#              30 steps with guidance, 1 and 4 pictures; the peer is diffusers with torch.compile
#
# The model FLOPs of a step are counted meanwhile on the CPU. Weights are random: nothing is fetched.
#
# --wheels=DIR installs DIR/*.whl without a network, for this run alone. cc_jax itself needs no
# installing, and no tensorflow; it needs jax with CUDA, flax, optax, orbax-checkpoint, jaxtyping,
# ml_collections, safetensors, pillow, tqdm, absl-py and etils; the peers need torch, transformers
# and diffusers (with importlib_metadata).
#
# --tiny tries every line at a few pixels, also on a CPU; its numbers say nothing.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-benchmarks/results} wheels="" minutes=9 tiny="" only=""
for argument in "$@"; do
  case $argument in
    --out=*) out=${argument#*=} ;;
    --wheels=*) wheels=${argument#*=} ;;
    --minutes=*) minutes=${argument#*=} ;;
    --parts=*) only=,${argument#*=}, ;;
    --tiny) tiny=--tiny ;;
    *) echo "error: unknown argument $argument; the top of benchmarks/gpu.sh lists them" >&2; exit 1 ;;
  esac
done
case $minutes in
  *[!0-9]* | "") echo "error: --minutes=$minutes is no whole number of minutes" >&2; exit 1 ;;
esac
limit=$((60 * minutes))
python=${PYTHON:-python3}
mkdir -p "$out" || exit 1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ -n "$wheels" ]; then
  ls "$wheels"/*.whl >/dev/null 2>&1 || { echo "error: no wheel in --wheels=$wheels" >&2; exit 1; }
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" \
    "$wheels"/*.whl || { echo "error: the wheels in $wheels do not install" >&2; exit 1; }
fi
export PYTHONPATH=$PWD:$scratch/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export GPU_RESULTS=$out/gpu.jsonl
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/compiled}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
: >"$GPU_RESULTS"

# Nothing is measured then, and XLA's optimizations take longest.
[ -n "$tiny" ] && export JAX_DISABLE_MOST_OPTIMIZATIONS=true OMP_NUM_THREADS=1

module() { "$python" -m "benchmarks.gpu.$1" ${tiny:+"$tiny"} "${@:2}"; }
note() { module record "$@"; }  # a line of results: PART KEY=VALUE...

if ! reason=$("$python" -m benchmarks.gpu.check ${tiny:+"$tiny"} 2>&1); then
  echo "error: $(tail -n 1 <<<"$reason")" >&2
  exit 1
fi
JAX_PLATFORMS=cpu module model_flops >"$scratch/flops.log" 2>&1 &
counting=$!

# part NAME BUDGET-OF-9-MINUTES MODULE ARGUMENTS...; `needs` holds Python modules to be there.
part() {
  local name=$1 budget=$(($2 * minutes / 9)) left=$((limit - SECONDS)) needed
  if [ -n "$only" ] && [[ $only != *,"$name",* ]]; then return; fi
  for needed in $needs; do
    if ! "$python" -c "import $needed" >/dev/null 2>&1; then
      note "$name" "skipped=no Python module $needed"
      return
    fi
  done
  if [ "$left" -lt 10 ]; then
    note "$name" "skipped=no time left of $minutes minutes"
    return
  fi
  [ "$budget" -gt "$left" ] && budget=$left
  echo "== $name, at most $budget s"
  timeout --kill-after=5 "$budget" "$python" -m "benchmarks.gpu.$3" ${tiny:+"$tiny"} "${@:4}" \
    2>"$scratch/$name.err"
  local code=$?
  if [ $code -eq 124 ] || [ $code -eq 137 ]; then
    note "$name" "ended=after its $budget s"
  elif [ $code -ne 0 ]; then
    tail -n 15 "$scratch/$name.err" >&2
    note "$name" "failed=$(tail -n 1 "$scratch/$name.err")"
  fi
  module summary --out="$out"
}

needs="" part rate 40 product_rate
needs="" part correct 70 correctness
needs="" part train 150 train_ours
needs="torch diffusers transformers" part peer-train 100 train_torch
needs="" part sample-sd15 60 sample_ours --base=sd15
needs="torch diffusers" part peer-sample-sd15 60 sample_torch --base=sd15
needs="" part sample-sdxl 80 sample_ours --base=sdxl
needs="torch diffusers" part peer-sample-sdxl 80 sample_torch --base=sdxl
if [ $((limit - SECONDS)) -gt 0 ]; then  # the count has run since the beginning
  for _ in $(seq $((limit - SECONDS))); do kill -0 $counting 2>/dev/null || break; sleep 1; done
fi
kill $counting 2>/dev/null && note model-flops "ended=not counted in time"
wait $counting 2>/dev/null
module summary --out="$out"
echo "$SECONDS s in all"
