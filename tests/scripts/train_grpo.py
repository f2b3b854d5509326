"""Somebody's own TRL script: it knows nothing of grpo-autotune.

usage: train_grpo.py MODEL [STEPS] [--straggler] [--fail]
"""

import os
import sys
import time

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer


def reward_length(completions, **kwargs):
    if "--straggler" in sys.argv and os.environ.get("RANK") == "1":
        time.sleep(0.4)
    if "--fail" in sys.argv:
        raise RuntimeError("the judge is down")
    return [len(completion[0]["content"]) % 7 / 6 for completion in completions]


if __name__ == "__main__":
    model, *rest = [word for word in sys.argv[1:] if not word.startswith("--")]
    steps = int(rest[0]) if rest else 3
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} plus three?"}]} for i in range(8)]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_length,
        args=GRPOConfig(
            output_dir=os.environ["OUTPUT_DIR"],
            max_steps=steps,
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=6,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    sys.stdout.write("the script goes on after training\n")
