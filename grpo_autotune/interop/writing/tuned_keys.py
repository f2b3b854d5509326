"""The table of what a search may tune: the key of each framework that says the same, and how its value is written.

Sources: the configuration classes of the frameworks (verl `trainer/config/{actor,rollout,data}`, EasyR1
`workers/*/config.py`, ms-swift `arguments/` and `rlhf_trainers/args_mixin.py`, TRL `trainer/grpo_config.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from grpo_autotune.config.sections.vllm import VLLM_TO_TRL
from grpo_autotune.interop.batch import SixNumbers, TrlBatch

Numbers = Callable[[SixNumbers, TrlBatch], Any]
"""A batch key's value, from the six numbers and TRL's keys on the source's own processes."""
Target = str | Callable[[Any], Mapping[str, Any]]
"""A key of the framework, or several with their values."""

ACTOR, ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
STEPS = ("max_steps", "save_steps", "eval_steps")


class Framework(NamedTuple):
    """One framework's side of the table."""

    batch: Mapping[str, Numbers]
    keys: Mapping[str, Target]  # key path of a `RunConfig` -> the key here
    steps: tuple[str, ...] = ()  # what `STEPS` are here, where they count rollouts; () where they count optimizer steps


def _engine(prefix: str, *names: str, **others: str) -> dict[str, Target]:
    """Engine keys under a prefix, those of another name by keyword."""
    return {f"vllm.{name}": prefix + others.get(name, name) for name in (*names, *others)}


def _in_groups(completions: int, group: int) -> int | float:
    """Completions as prompts; a fraction, which no framework takes, where they are no whole groups."""
    return completions // group if completions % group == 0 else completions / group


VERL = Framework(
    batch={
        f"{ROLLOUT}n": lambda six, trl: six.num_generations,
        "data.train_batch_size": lambda six, trl: six.prompts,
        f"{ACTOR}ppo_mini_batch_size": lambda six, trl: _in_groups(six.completions, six.num_generations),
        f"{ACTOR}ppo_micro_batch_size_per_gpu": lambda six, trl: trl.per_device_train_batch_size,
        f"{ACTOR}ppo_epochs": lambda six, trl: six.passes,
    },
    keys={
        **_engine(
            ROLLOUT, "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager",
            "enable_prefix_caching", "enable_chunked_prefill", "quantization",
            tensor_parallel_size="tensor_model_parallel_size",
        ),
        "vllm.kv_cache_dtype": f"+{ROLLOUT}engine_kwargs.vllm.kv_cache_dtype",
        "vllm.sleep_level": lambda level: {f"{ROLLOUT}free_cache_engine": level > 0},
        "grpo.beta": lambda beta: {f"{ACTOR}use_kl_loss": beta > 0, f"{ACTOR}kl_loss_coef": beta},
        "grpo.gradient_checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
        "grpo.max_completion_length": "data.max_response_length",
        "grpo.dataloader_num_workers": "data.dataloader_num_workers",
        "model.attn_implementation": "+actor_rollout_ref.model.override_config.attn_implementation",
        "peft.r": "actor_rollout_ref.model.lora_rank",
    },
    steps=("trainer.total_training_steps", "trainer.save_freq", "trainer.test_freq"),
)  # fmt: skip
EASYR1 = Framework(
    batch={
        "worker.rollout.n": lambda six, trl: six.num_generations,
        "data.rollout_batch_size": lambda six, trl: six.prompts,
        "worker.actor.global_batch_size": lambda six, trl: _in_groups(six.completions, six.num_generations),
        "worker.actor.micro_batch_size_per_device_for_update": lambda six, trl: trl.per_device_train_batch_size,
        "worker.actor.ppo_epochs": lambda six, trl: six.passes,
    },
    keys={
        **_engine(
            "worker.rollout.", "gpu_memory_utilization", "max_num_batched_tokens", "enforce_eager",
            "enable_chunked_prefill", "tensor_parallel_size",
        ),
        "grpo.beta": lambda beta: {"algorithm.disable_kl": beta == 0, "algorithm.kl_coef": beta},
        "grpo.gradient_checkpointing": "worker.actor.model.enable_gradient_checkpointing",
        "grpo.max_completion_length": "data.max_response_length",
        "data.image_size": lambda side: {"data.max_pixels": side * side},
        "peft.r": "worker.actor.model.lora.rank",
    },
    steps=("trainer.max_steps", "trainer.save_freq", "trainer.val_freq"),
)  # fmt: skip
TRL_BATCH: dict[str, Numbers] = {
    "num_generations": lambda six, trl: trl.num_generations,
    "per_device_train_batch_size": lambda six, trl: trl.per_device_train_batch_size,
    "gradient_accumulation_steps": lambda six, trl: trl.gradient_accumulation_steps,
    "steps_per_generation": lambda six, trl: trl.steps_per_generation,
    "num_iterations": lambda six, trl: trl.num_iterations,
}
TRL = Framework(
    batch=TRL_BATCH,
    keys={
        **{f"vllm.{ours}": name for ours, name in VLLM_TO_TRL.items()},
        "vllm.sleep_level": lambda level: {"vllm_enable_sleep_mode": level > 0},
        "model.attn_implementation": "attn_implementation",
        "model.load_in_4bit": "load_in_4bit",
        "peft.r": "lora_r",
    },
)
SWIFT = Framework(
    batch=TRL_BATCH,
    keys={
        **_engine(
            "vllm_", "gpu_memory_utilization", "max_num_seqs", "enforce_eager", "tensor_parallel_size",
            "enable_prefix_caching", "quantization",
        ),
        "vllm.sleep_level": "sleep_level",
        "vllm.weight_sync": lambda how: {"vllm_enable_lora": how == "adapter"},
        "data.image_size": lambda side: {"max_pixels": side * side},
        "model.attn_implementation": lambda name: {"attn_impl": name.replace("flash_attention_2", "flash_attn")},
        "peft.r": "lora_rank",
    },
)  # fmt: skip
FRAMEWORKS = {"verl": VERL, "easyr1": EASYR1, "ms-swift": SWIFT}
"""By name in lower letters; all others have TRL's keys."""
WHY = {
    "speedups": "a speed-up of grpo-autotune, which trains with TRL",
    "data.image_size": "no key of this framework limits images: resize them in the data, or in its code",
    "vllm.weight_sync": "it decides itself how weights reach the engine",
}
"""Key path -> why it is lost where a framework has no key for it."""


def framework_of(name: str) -> Framework:
    """The side of a framework."""
    return FRAMEWORKS.get(name.lower(), TRL)


def values_of(side: Framework, key: str, value: Any) -> Mapping[str, Any]:
    """A tuned key in the framework's keys; nothing where it has none."""
    section, _, name = key.partition(".")
    target = side.keys.get(key) or (name if section == "grpo" and side.batch is TRL_BATCH else None)
    return {} if target is None else {target: value} if isinstance(target, str) else target(value)
