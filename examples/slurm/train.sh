#!/bin/bash
# Training on 2 nodes of 4 GPUs: sbatch examples/slurm/train.sh grpo.yaml runs/grpo
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-gpu=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

config=${1:-grpo.yaml} run=${2:-runs/grpo}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stop() { stopped=yes; kill -USR1 "$step"; } # 120 s before the time limit: a checkpoint after the step under way
trap stop USR1

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-$SLURM_RESTART_COUNT" \
  --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 110 \
  -m grpo_autotune train "$config" --out "$run" --resume auto &
step=$!
wait "$step"; code=$?
if [ -n "$stopped" ]; then # the trap ended that wait
  wait "$step"; code=$?
fi

if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID" # goes on from the checkpoint
fi
exit "$code"
