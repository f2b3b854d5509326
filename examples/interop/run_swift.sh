#!/usr/bin/env bash
# GRPO on handwritten digits with ms-swift. Written for the page docs/interop.md.
NPROC_PER_NODE=2 \
MAX_PIXELS=50176 \
swift rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen2.5-VL-3B-Instruct \
    --tuner_type lora \
    --dataset digits.jsonl \
    --reward_funcs format \
    --use_vllm true \
    --vllm_mode colocate \
    --num_generations 8 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --max_completion_length 64 \
    --learning_rate 1e-5 \
    --num_train_epochs 1 \
    --output_dir output
