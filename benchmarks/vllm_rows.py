"""Trainers of middling size that generate with vLLM in their own process, and the prompts that they send it."""

from __future__ import annotations

from typing import Any

from benchmarks.midsize import midsize_config
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.probe.startup import Startup
from grpo_autotune.train.trial_trainer import quiet_trainer

GENERATIONS = 8


def vllm_trainer(size: str, *, prompts: int, pixels: int, completion: int, vllm: dict[str, Any]) -> Any:
    """A trainer of `prompts` groups of eight, all completions of one length, with these keys of the `vllm` section."""
    grpo = {
        "use_vllm": True,
        "max_steps": 1,
        "num_generations": GENERATIONS,
        "per_device_train_batch_size": prompts * GENERATIONS,
        "gradient_accumulation_steps": 1,
        "generation_kwargs": {"min_tokens": completion},
        "eval_strategy": "no",
    }
    values = midsize_config(size, pixels=pixels, completion=completion, grpo=grpo).to_dict()
    del values["data"]["max_eval_samples"], values["data"]["eval_split"]
    largest = {"image": {"count": 1, "width": pixels, "height": pixels}, "video": 0}
    vllm = {"mode": "colocate", "max_model_len": 2048, "limit_mm_per_prompt": largest, **vllm}
    return quiet_trainer(RunConfig.from_dict({**values, "vllm": vllm}), Startup(), lambda line: None)


def requests(trainer: Any, rows: range) -> tuple[Any, Any]:
    """Prompt ids and images of groups of eight over these rows of the data, as TRL hands them to the engine."""
    from trl.data_utils import prepare_multimodal_messages

    prompts = []
    for row in (trainer.train_dataset[index] for index in rows):
        prompts += [prepare_multimodal_messages(row["prompt"], images=[row["image"]])] * GENERATIONS
    ids, images, _ = trainer._tokenize_prompts(prompts)
    return ids, images
