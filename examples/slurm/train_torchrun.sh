#!/bin/bash
# The same under torchrun, a task on each node: sbatch examples/slurm/train_torchrun.sh grpo.yaml runs/grpo
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

config=${1:-grpo.yaml} run=${2:-runs/grpo}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job

srun --wait=60 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-$SLURM_RESTART_COUNT" \
  --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 110 \
  -m grpo_autotune train "$config" --out "$run" --resume auto
code=$?

# torchrun ends with 1 whatever ended its ranks, with 2 where it does not know an option: a run that has not finished is begun
# again, but not for ever
if [ $code -ne 2 ] && [ ! -d "$run/model" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 30 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
