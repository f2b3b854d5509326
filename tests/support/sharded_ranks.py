"""`torchrun -m tests.support.sharded_ranks MODELS OUT STEPS SHARDING=CASE...`: plain and sped up trainings, in turns,
on processes that share weights or gradients by one of `SHARDINGS`; each process writes what it found for each word to
`OUT/rankN.json`. A collective that not all ranks take part in ends the processes after `PATIENCE`. FSDP2 runs on CPU
processes (`fsdp_cpu`).

Under autocast to bfloat16 (`bf16`) completions are drawn by themselves, and plain TRL in float32 is a third training:
how far it is from plain TRL under autocast is what rounding does."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from grpo_autotune.seams import fully_sharded, ranks
from grpo_autotune.seams.layers import OUTERMOST
from grpo_autotune.seams.mixed_image_rows import mend
from grpo_autotune.seams.table import find, wrap_rows
from grpo_autotune.seams.trainer_access import SPEED_UPS
from grpo_autotune.speedups.install import speed_up
from tests.support.exactness import apart, asked
from tests.support.fsdp_cpu import allow, whole
from tests.support.pairs import rewards_of
from tests.support.trainers import make_trainer, spread_reward
from tests.support.wrong_speedups import ALONE, EARLY, FAILING, WRONG

PATIENCE = 60
"""Seconds."""
RANK = int(os.environ.get("RANK", "0"))


def zero(stage: int, **more: Any) -> dict[str, Any]:
    numbers = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return {"deepspeed": {**dict.fromkeys(numbers, "auto"), "zero_optimization": {"stage": stage, **more}}}


SHARDINGS: dict[str, dict[str, Any]] = {
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3, stage3_param_persistence_threshold=0),
    "zero3 not gathered": {**zero(3, stage3_param_persistence_threshold=0), "ds3_gather_for_generation": False},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}},
}

HALF_GROUPS = {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 4}
BF16 = {"bf16": True, "beta": 0.05}
CASES: dict[str, dict[str, Any]] = {
    "text": {"kind": "llama", "lora": False, "grpo": {**HALF_GROUPS, "beta": 0.05, "gradient_checkpointing": True}},
    "text alive": {"kind": "qwen3", "lora": True, "grpo": {"per_device_train_batch_size": 4, "num_generations": 4}},
    "images": {"kind": "qwen3_vl", "lora": True, "grpo": {**HALF_GROUPS, "beta": 0.0}, "dead": True},
    "images, tower trained": {"kind": "qwen3_vl", "lora": False, "grpo": {**HALF_GROUPS, "beta": 0.0}},
    "mixed": {"kind": "qwen3_vl", "lora": True, "grpo": {**HALF_GROUPS, "beta": 0.0}, "mixed": True, "dead": True},
    "mixed, tower trained": {"kind": "qwen3_vl", "lora": False, "grpo": {**HALF_GROUPS, "beta": 0.0}, "mixed": True},
    "mixed, reference": {"kind": "qwen2_5_vl", "lora": True, "grpo": {**HALF_GROUPS, "beta": 0.05}, "mixed": True},
    "failing": {"kind": "qwen3", "lora": False, "grpo": {**HALF_GROUPS, "beta": 0.0}, "names": [FAILING]},
    "text, bf16": {"kind": "llama", "lora": False, "grpo": {**HALF_GROUPS, **BF16, "gradient_checkpointing": True}},
    "images, bf16": {"kind": "qwen3_vl", "lora": True, "grpo": {**HALF_GROUPS, **BF16}, "dead": True},
    "alone": {"kind": "qwen3", "lora": False, "grpo": {**HALF_GROUPS, "beta": 0.0}, "names": [ALONE]},
    "early": {"kind": "qwen3", "lora": False, "grpo": {**HALF_GROUPS, "beta": 0.0}, "names": [EARLY]},
    "wrong": {"kind": "qwen3", "lora": False, "grpo": {**HALF_GROUPS, "beta": 0.0}, "names": [WRONG, "shared_prefix"]},
}  # fmt: skip


def dead_on_the_second(completions: list[Any], **kwargs: Any) -> list[float]:
    """No group of the second process has a spread, every other group of the first has one."""
    return [float(RANK == 0 and index % 8 == 0) for index in range(len(completions))]


def rows_of(kind: str, *, mixed: bool = False) -> list[dict[str, Any]]:
    """Eight prompts of uneven length; `mixed`, five of them have no image."""
    from PIL import Image

    rows: list[dict[str, Any]] = []
    for n in range(8):
        text = f"{'How many are there? ' * (n % 3)}What is {n}?"
        rows.append({"prompt": [{"role": "user", "content": text}], "answer": str(n)})
        if kind.endswith("vl"):
            image = Image.new("RGB", (56, 56 + 28 * (n % 2)), (30 * n, 90, 120))
            rows[-1]["images"] = [] if mixed and n % 3 != 1 else [image]
    return rows


class _Check(TrainerCallback):
    """What the package's own trainer does once the model is sharded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        fully_sharded.check_output_layer(model)
        fully_sharded.see_trained(model)


def _whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    weights = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    if any(hasattr(value, "ds_id") for value in weights.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(weights.values())):
            return {name: value.detach().clone() for name, value in weights.items()}
    return {name: whole(value) for name, value in weights.items()}


def _end_of_text(model: Path) -> int:
    from transformers import AutoTokenizer

    return int(AutoTokenizer.from_pretrained(model).eos_token_id)


def _draw_completions(trainer: Any) -> None:
    """Have completions that follow from the rank alone."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    draw, known = random.Random(RANK), tokenizer("How many are there? 0 1 2 3 4 5 6 7")["input_ids"]

    def turn(call_next: Any, /, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return [draw.choices(known, k=draw.randint(2, 12)) for _ in prompt_ids], None

    wrap_rows(trainer, [(find("turn"), turn)], OUTERMOST)


def train(model: Path, case: dict[str, Any], out: Path, sharding: str, names: str | Sequence[Any], steps: int) -> Any:
    """A trainer after its training, what was on it, and its weights in one piece."""
    bias = {"sequence_bias": [[[_end_of_text(model)], 3.0]]}  # completions end early, each at another place
    with ExitStack() as inside:
        if sharding == "fsdp2":
            inside.enter_context(fully_sharded.reference_by_layers())
        trainer = make_trainer(
            model, rows_of(case["kind"], mixed=case.get("mixed", False)), out / "trainer", lora=case["lora"],
            rewards=[dead_on_the_second if case.get("dead") else spread_reward], optim="sgd", learning_rate=0.05,
            max_steps=steps, max_completion_length=12, generation_kwargs=bias, ddp_find_unused_parameters=False,
            ddp_timeout=PATIENCE, **SHARDINGS[sharding], **case["grpo"],
        )  # fmt: skip
    if trainer.is_fsdp_enabled:
        fully_sharded.fit(trainer.accelerator.state.fsdp_plugin, trainer.model)
        trainer.add_callback(_Check())
    mend(trainer)
    if "bf16" in case["grpo"]:
        _draw_completions(trainer)
    speedups = speed_up(trainer, asked(names), check="auto" if names == "none" or "bf16" in case["grpo"] else "always")
    trainer.train()
    return trainer, speedups, _whole_weights(trainer)


def fresh() -> None:
    """Forget how the last trainer shared its weights."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    gc.collect()


def compared(models: Path, out: Path, sharding: str, case: dict[str, Any], steps: int) -> dict[str, Any]:
    """How far a case's weights are apart, relative; whether rewards are equal; what was on, and why not the rest."""
    ended = []
    exact = {**case, "grpo": {**case["grpo"], "bf16": False}}
    first = [("none", exact)] if "bf16" in case["grpo"] else []
    for wanted, given in (*first, ("none", case), (case.get("names", "auto"), case)):
        fresh()
        begin = time.perf_counter()
        trainer, speedups, weights = train(models / case["kind"], given, out, sharding, wanted, steps)
        ended.append((rewards_of(trainer), weights))
        told = {
            "table": {row.name: [row.on, row.reason] for row in speedups.table()},
            "facts": speedups.facts(),
            "seconds": round(time.perf_counter() - begin, 1),
            "sharded": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        }
        speedups.remove()
        assert not hasattr(trainer, SPEED_UPS)
        del trainer
    *_, (rewards, weights), (fast_rewards, fast) = ended
    return {
        "same_rewards": rewards == fast_rewards,
        "rewards": rewards,
        "apart": max(apart(fast[name], weights[name]) for name in weights),
        "moved": _distance(fast, weights),
        "rounded": _distance(ended[0][1], weights),
        **told,
    }


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def main(models: str, out: str, steps: str, *words: str) -> None:
    allow()
    ranks.WAIT_S = 3.0
    if any(word.startswith("zero") for word in words):
        import deepspeed  # ZeRO-3 shards a model as it is loaded, and transformers begins without DeepSpeed on a CPU

        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=PATIENCE))
    found = {}
    for word in words:
        sharding, _, case = word.partition("=")
        found[word] = compared(Path(models), Path(out), sharding, CASES[case], int(steps))
    (Path(out) / f"rank{RANK}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()  # else its threads may still run when the process ends, which aborts it


if __name__ == "__main__":
    main(*sys.argv[1:])
