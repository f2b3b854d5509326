#!/bin/bash
# A vLLM server on the first of 3 nodes, training on the others: sbatch examples/slurm/server.sh grpo.yaml runs/grpo
#SBATCH --job-name=grpo-server
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-gpu=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120

config=${1:-grpo.yaml} run=${2:-runs/grpo}
hosts=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
server=(--set vllm.mode=server --set "vllm.server_base_url=http://${hosts[0]}:8000" --set vllm.server_timeout=900)
export TMPDIR=$PWD/$run/tmp # on the disk that all nodes share: adapters reach the server through it
mkdir -p "$TMPDIR"

stop() { stopped=yes; kill -USR1 "$step"; } # 120 s before the time limit: a checkpoint after the step under way
trap stop USR1

srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" \
  grpo-autotune serve "$config" --out "$run" "${server[@]}" &
serving=$!
srun --nodes=2 --ntasks=2 --exclude="${hosts[0]}" --kill-on-bad-exit=1 torchrun \
  --nnodes 2 --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-$SLURM_RESTART_COUNT" \
  --rdzv-endpoint "${hosts[1]}:$((20000 + SLURM_JOB_ID % 20000))" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 110 \
  -m grpo_autotune train "$config" --out "$run" --resume auto "${server[@]}" &
step=$!
wait "$step"; code=$?
if [ -n "$stopped" ]; then # the trap ended that wait
  wait "$step"; code=$?
fi
kill "$serving"

if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID" # goes on from the checkpoint
fi
exit "$code"
