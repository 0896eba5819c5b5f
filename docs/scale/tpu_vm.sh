#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, installs, starts the same program on every host.
#
#   PROJECT=my-project ZONE=us-west4-a BUCKET=gs://my-bucket docs/scale/tpu_vm.sh
#
# The same command again continues: the program goes on from the last checkpoint in the bucket.
# Every host downloads the base that the config names (docs/scale.md). Your pictures and other
# settings: ARGUMENTS="--config.data.name=..."
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}"
NAME=${NAME:-cc-jax}
TYPE=${TYPE:-v5litepod-16}             # v5e:4x4. v6e-16 = v6e:4x4; v5p-32 = v5p:2x2x4 (cores!)
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}  # v2-alpha-tpuv6e; v2-alpha-tpuv5
HOSTS=${HOSTS:-4}                      # of this slice; a missing one is then an error, not a hang
CONFIG=${CONFIG:-configs/sd15.py}
SOURCE=${SOURCE:-.}                    # the checkout to run
HERE=(--project "$PROJECT" --zone "$ZONE")

if ! gcloud compute tpus tpu-vm describe "$NAME" "${HERE[@]}" > /dev/null 2>&1; then
  gcloud compute tpus tpu-vm create "$NAME" "${HERE[@]}" \
    --accelerator-type "$TYPE" --version "$RUNTIME" ${SPOT:+--spot}
fi

tar -czf /tmp/cc_jax.tgz --exclude=.git --exclude=runs -C "$SOURCE" .
gcloud compute tpus tpu-vm scp /tmp/cc_jax.tgz "$NAME":/tmp/cc_jax.tgz "${HERE[@]}" --worker=all
# The image's own Python may be older than ours.
on_all() { gcloud compute tpus tpu-vm ssh "$NAME" "${HERE[@]}" --worker=all --command="$1"; }

on_all "mkdir -p ~/cc_jax && tar -xzf /tmp/cc_jax.tgz -C ~/cc_jax &&
  python3 -m pip install -q --user uv &&
  python3 -m uv venv -q --allow-existing --python 3.11 ~/venv &&
  cd ~/cc_jax && python3 -m uv pip install -q --python ~/venv -e '.[tpu]'"
on_all "cd ~/cc_jax && ~/venv/bin/python -m cc_jax.train --config=$CONFIG \
  --workdir=$BUCKET/$NAME --config.mesh.processes=$HOSTS ${ARGUMENTS:-}"
