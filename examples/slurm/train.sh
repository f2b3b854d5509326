#!/bin/bash
# Training on 2 nodes of 4 GPUs: sbatch examples/slurm/train.sh grpo.yaml runs/grpo
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job

# Each task of srun is a rank: signals reach it, and its exit code reaches this script.
srun --wait=60 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec grpo-autotune train "$0" --out "$1" --resume auto' "${1:-grpo.yaml}" "${2:-runs/grpo}"
code=$?

case $code in
  138 | 140 | 143) scontrol requeue "$SLURM_JOB_ID" ;; # stopped with a checkpoint, from which the job goes on
esac
exit $code
