#!/usr/bin/env bash
# GRPO on handwritten digits with verl. Written for the page docs/interop.md.
set -xeuo pipefail

GROUP=${GROUP:-8}
BATCH=${BATCH:-16}           # prompts per rollout
export WANDB_API_KEY=not-a-real-key-0123456789

ACTOR=(
    actor_rollout_ref.actor.optim.lr=1e-3
    actor_rollout_ref.actor.ppo_mini_batch_size=8
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef=0.01
    actor_rollout_ref.actor.kl_loss_type=low_var_kl
    actor_rollout_ref.actor.freeze_vision_tower=True
)

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files=examples/interop/digits_train.parquet \
    data.val_files=examples/interop/digits_test.parquet \
    data.image_key=images \
    data.train_batch_size=$BATCH \
    data.max_prompt_length=256 \
    data.max_response_length=$((3 * 4)) \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.model.path=demo \
    actor_rollout_ref.model.lora_rank=16 \
    actor_rollout_ref.model.lora_alpha=32 \
    "${ACTOR[@]}" \
    actor_rollout_ref.rollout.name=hf \
    actor_rollout_ref.rollout.n=$GROUP \
    actor_rollout_ref.rollout.temperature=1.0 \
    custom_reward_function.path=examples/interop/digit_reward.py \
    custom_reward_function.name=compute_score \
    trainer.n_gpus_per_node=2 \
    trainer.nnodes=1 \
    trainer.logger='["console"]' \
    trainer.save_freq=20 \
    trainer.test_freq=10 \
    trainer.total_epochs=1 "$@"
