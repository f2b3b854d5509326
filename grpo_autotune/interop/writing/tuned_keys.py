"""The table of what a search may tune: the key of each framework that says the same, and how its value is written.

Sources: the configuration classes of the frameworks (verl `trainer/config/{actor,rollout,data}`, EasyR1
`workers/*/config.py`, ms-swift `arguments/` and `rlhf_trainers/args_mixin.py`, TRL `trainer/grpo_config.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.config.sections.vllm import VLLM_TO_TRL
from grpo_autotune.interop.frameworks.rollout_words import keys_of
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import SixNumbers, TrlBatch

Numbers = Callable[[SixNumbers, TrlBatch], Any]  # a batch key's value, from the six numbers and TRL's keys
Target = str | Callable[[Any], Mapping[str, Any]]  # a key of the framework, or several with their values


class Framework(NamedTuple):
    """One framework's side of the table."""

    batch: Mapping[str, Numbers]
    keys: Mapping[str, Target | None]  # key path of a `RunConfig` -> the key here; those of TRL's name are left out
    rollouts: tuple[str, ...] = ()  # keys that count rollouts
    micro: str = ""  # the micro batch, with which `fixed` is written as well
    fixed: Mapping[str, Any] = {}


def _engine(prefix: str, names: str, **others: str) -> dict[str, Target]:
    return {f"vllm.{name}": prefix + others.get(name, name) for name in (*names.split(), *others)}


def _in_groups(completions: int, group: int) -> int | float:
    """Completions as prompts; a fraction, which no framework takes, where they are no whole groups."""
    return completions // group if completions % group == 0 else completions / group


def _of_trl(name: str) -> Numbers:
    return lambda six, trl: getattr(trl, name)


def _rollout_trainer(framework: str, micro: str, by_tokens: str, keys: Mapping[str, Target | None]) -> Framework:
    """The side of verl or EasyR1, where `by_tokens` makes a micro batch of as many completions as fit."""
    names = keys_of(framework)
    batch: dict[str, Numbers] = {
        names.group: _of_trl("num_generations"), names.prompts: lambda six, trl: six.prompts,
        names.mini: lambda six, trl: _in_groups(six.completions, six.num_generations),
        micro: _of_trl("per_device_train_batch_size"), names.passes: lambda six, trl: six.passes,
    }  # fmt: skip
    rollouts = (names.steps, names.save, names.val, names.warmup_steps)
    more = {"grpo.max_completion_length": names.longest_completion, "peft.r": names.rank}
    return Framework(batch, {**keys, **more}, rollouts, micro, {by_tokens: False})


ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{name}." for name in ("actor", "model", "rollout"))
VERL = _rollout_trainer("verl", f"{ACTOR}ppo_micro_batch_size_per_gpu", f"{ACTOR}use_dynamic_bsz", {
    **_engine(
        ROLLOUT, "gpu_memory_utilization max_num_seqs max_num_batched_tokens enforce_eager enable_prefix_caching "
        "enable_chunked_prefill quantization", tensor_parallel_size="tensor_model_parallel_size",
    ),
    "vllm.kv_cache_dtype": f"+{ROLLOUT}engine_kwargs.vllm.kv_cache_dtype",
    "vllm.sleep_level": lambda level: {f"{ROLLOUT}free_cache_engine": level > 0},
    "grpo.beta": lambda beta: {f"{ACTOR}use_kl_loss": beta > 0, f"{ACTOR}kl_loss_coef": beta},
    "grpo.gradient_checkpointing": f"{MODEL}enable_gradient_checkpointing",
    "grpo.dataloader_num_workers": "data.dataloader_num_workers",
    "model.attn_implementation": f"+{MODEL}override_config.attn_implementation",
})  # fmt: skip
MICRO = "worker.actor.micro_batch_size_per_device_for_update"
EASYR1 = _rollout_trainer("easyr1", MICRO, "worker.actor.dynamic_batching", {
    **_engine("worker.rollout.", "gpu_memory_utilization max_num_batched_tokens enforce_eager enable_chunked_prefill "
              "tensor_parallel_size"),
    "grpo.beta": lambda beta: {"algorithm.disable_kl": beta == 0, "algorithm.kl_coef": beta},
    "grpo.gradient_checkpointing": "worker.actor.model.enable_gradient_checkpointing",
    "data.image_size": lambda side: {"data.max_pixels": side * side},
})  # fmt: skip
TRL_BATCH: dict[str, Numbers] = {name: _of_trl(name) for name in TrlBatch.__annotations__}
TRL = Framework(TRL_BATCH, {
    **{f"vllm.{ours}": name for ours, name in VLLM_TO_TRL.items()},
    "vllm.sleep_level": lambda level: {"vllm_enable_sleep_mode": level > 0},
    "model.attn_implementation": "attn_implementation", "model.load_in_4bit": "load_in_4bit", "peft.r": "lora_r",
})  # fmt: skip
SWIFT = Framework(TRL_BATCH, {
    **_engine("vllm_", "gpu_memory_utilization max_num_seqs enforce_eager tensor_parallel_size enable_prefix_caching "
              "quantization"),
    "grpo.cache_implementation": None, "grpo.use_transformers_continuous_batching": None,
    "vllm.sleep_level": "sleep_level", "peft.r": "lora_rank",
    "vllm.weight_sync": lambda how: {"vllm_enable_lora": how == "adapter"},
    "data.image_size": lambda side: {"max_pixels": side * side},
    "model.attn_implementation": lambda name: {"attn_impl": name.replace("flash_attention_2", "flash_attn")},
})  # fmt: skip
MEGATRON = Framework({
    "num_generations": TRL_BATCH["num_generations"], "micro_batch_size": TRL_BATCH["per_device_train_batch_size"],
    "global_batch_size": lambda six, trl: six.completions,
    "steps_per_generation": lambda six, trl: trl.steps_per_generation / trl.gradient_accumulation_steps,
    "num_iterations": lambda six, trl: six.passes,
}, {**SWIFT.keys, "grpo.gradient_checkpointing": None})  # fmt: skip
R1_V = Framework({
    "num_generations": TRL_BATCH["num_generations"],
    "per_device_train_batch_size": lambda six, trl: trl.per_device_train_batch_size / six.num_generations,
    "gradient_accumulation_steps": TRL_BATCH["gradient_accumulation_steps"],
}, TRL.keys)  # fmt: skip
SCRIPT = TRL._replace(keys={key: name for key, name in TRL.keys.items() if key.startswith("vllm.")})
"""Of a program: its `GRPOConfig` alone; the model and the adapter are made elsewhere in it."""
UNSLOTH = SCRIPT._replace(keys={**SCRIPT.keys, "grpo.gradient_checkpointing": None})
FRAMEWORKS = {"verl": VERL, "easyr1": EASYR1, "ms-swift": SWIFT, "r1-v": R1_V}  # by name; all others have TRL's keys
WHY = {  # key path -> why it is lost where a framework has no key for it
    "speedups": "a speed-up of grpo-autotune, which trains with TRL",
    "data.image_size": "no key of this framework limits images: resize them in the data, or in its code",
    "vllm.weight_sync": "it decides itself how weights reach the engine",
}


def framework_of(source: Source) -> Framework:
    """The side of a source's framework; Megatron and Ray in ms-swift have other names for the batch."""
    if source.framework == "ms-swift" and source.settings.keys() & {"global_batch_size", "micro_batch_size"}:
        return MEGATRON
    script = UNSLOTH if source.framework == "unsloth" else SCRIPT
    return script if source.path.suffix in (".py", ".ipynb") else FRAMEWORKS.get(source.framework, TRL)


def values_of(side: Framework, key: str, value: Any) -> Mapping[str, Any]:
    """A tuned key in the framework's keys; nothing where it has none, and for those of the batch."""
    name = key.removeprefix("grpo.")
    shared = name if name != key and name in grpo_keys() and "num_generations" in side.batch else None
    target = None if name in TRL_BATCH else side.keys.get(key, shared)
    return {} if target is None else {target: value} if isinstance(target, str) else target(value)
