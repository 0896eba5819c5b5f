#!/usr/bin/env bash
# Trains on GPU nodes: one process per node, which drives all of the node's GPUs.
#
#   sbatch --nodes=4 docs/scale/slurm.sh
#
# JAX finds its coordinator in Slurm's environment. Before the time limit, or when the job is
# preempted, every process gets SIGTERM, saves and exits with 143; the job then goes back into the
# queue and continues from that step, on another number of nodes if need be.
#
# Nodes without network: download the base that the config names on the login node (docs/scale.md),
# to an HF_HOME that all nodes see, and set HF_HUB_OFFLINE=1. Your pictures and other settings come
# after the script's name: docs/scale/slurm.sh --config.data.name=...
#SBATCH --job-name=cc_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

CONFIG=${CONFIG:-configs/sd15.py}
WORKDIR=${WORKDIR:-$SLURM_SUBMIT_DIR/runs/$SLURM_JOB_NAME}  # a file system that all nodes see
cd "$SLURM_SUBMIT_DIR"

# Under Slurm JAX gives each process one GPU, that of its number on the node; ours takes them all.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS

status=0
srun --kill-on-bad-exit=1 python -m cc_jax.train --config="$CONFIG" --workdir="$WORKDIR" \
  --config.mesh.processes="$SLURM_NNODES" "$@" || status=$?
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
