#!/bin/bash
# A vLLM server on the first of 3 nodes, training on the others: sbatch examples/slurm/server.sh grpo.yaml runs/grpo
#SBATCH --job-name=grpo-server
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

config=${1:-grpo.yaml} run=${2:-runs/grpo}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
server=(--set vllm.mode=server --set "vllm.server_base_url=http://${hosts[0]}:8000" --set vllm.server_timeout=900)
export MASTER_ADDR=${hosts[1]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job

# This script runs on the first node. What it starts without srun gets none of the signals that stop the training.
grpo-autotune serve "$config" --out "$run" "${server[@]}" &
serves=$!

export TMPDIR=$PWD/$run/tmp # on the disk that all nodes share: adapters reach the server through it
mkdir -p "$TMPDIR"
srun --nodes=2 --ntasks=$((2 * SLURM_NTASKS_PER_NODE)) --exclude="${hosts[0]}" --wait=60 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec grpo-autotune train "$@"' - "$config" --out "$run" --resume auto "${server[@]}"
code=$?
kill "$serves" && wait "$serves"

case $code in
  138 | 140 | 143) scontrol requeue "$SLURM_JOB_ID" ;; # stopped with a checkpoint, from which the job goes on
esac
exit $code
