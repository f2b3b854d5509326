#!/bin/bash
# A search with one trial at a time on each of 4 GPUs: sbatch examples/slurm/search.sh grpo.yaml runs/grpo/search
#SBATCH --job-name=grpo-search
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=03:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job
srun grpo-autotune search "${1:-grpo.yaml}" --run-dir "${2:-runs/grpo/search}" \
  --workers auto --budget 2h30m --resume auto
code=$?

case $code in
  138 | 140 | 143) scontrol requeue "$SLURM_JOB_ID" ;; # stopped within its budget, with which the job goes on
esac
exit $code
