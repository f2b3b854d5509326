"""EasyR1: YAML with overrides of OmegaConf, and the `experiment_config.json` that a run leaves.

Defaults are those of its classes at b44b311 (07/2026) and 6241a21 (02/2025), which names some keys otherwise.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import rollout_trainers as shared
from grpo_autotune.interop.frameworks.rollout_trainers import Keys, on, refuse
from grpo_autotune.interop.reading.beside import beside
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation
from grpo_autotune.records.imported import Verdict

ACTOR, ROLLOUT, ALGORITHM = "worker.actor.", "worker.rollout.", "algorithm."
MODEL, OPTIM, LORA, VALIDATION = (
    f"{ACTOR}model.",
    f"{ACTOR}optim.",
    f"{ACTOR}model.lora.",
    f"{ROLLOUT}val_override_config.",
)
AVERAGE, LOSS, MICRO = f"{ACTOR}loss_avg_mode", f"{ACTOR}loss_type", f"{ACTOR}micro_batch_size_per_device_for_update"

KEYS = Keys(
    group=f"{ROLLOUT}n", prompts="data.rollout_batch_size", mini=f"{ACTOR}global_batch_size", passes=f"{ACTOR}ppo_epochs",
    nodes="trainer.nnodes", gpus="trainer.n_gpus_per_node", estimator=f"{ALGORITHM}adv_estimator",
    low=f"{ACTOR}clip_ratio_low", high=f"{ACTOR}clip_ratio_high", dual=f"{ACTOR}clip_ratio_dual",
    warmup_steps=f"{OPTIM}lr_warmup_steps", warmup_ratio=f"{OPTIM}lr_warmup_ratio", schedule=f"{OPTIM}lr_scheduler_type",
    least_rate=f"{OPTIM}min_lr_ratio", epochs="trainer.total_epochs", steps="trainer.max_steps", save="trainer.save_freq",
    keep="trainer.save_limit", val="trainer.val_freq", val_first="trainer.val_before_train", logger="trainer.logger",
    run="trainer.experiment_name", rank=f"{LORA}rank", alpha=f"{LORA}alpha", adapted=f"{LORA}target_modules",
    kept_out=f"{LORA}exclude_modules", parallel=f"{ROLLOUT}tensor_parallel_size", top_k=f"{ROLLOUT}top_k",
    longest_prompt="data.max_prompt_length", longest_completion="data.max_response_length",
    filter_prompts="data.filter_overlong_prompts", overflow="data.truncation",
)  # fmt: skip

DEFAULTS: dict[str, Any] = {
    "data.max_prompt_length": 512, "data.max_response_length": 512, "data.rollout_batch_size": 512,
    "data.filter_overlong_prompts": True, "data.truncation": "error", "data.shuffle": True, "data.seed": 1,
    "data.min_pixels": 262144, "data.max_pixels": 4194304, "data.prompt_key": "prompt", "data.answer_key": "answer",
    "data.image_key": "images", "algorithm.adv_estimator": "grpo", "algorithm.disable_kl": False,
    "algorithm.use_kl_loss": False, "algorithm.kl_penalty": "kl", "algorithm.kl_coef": 1e-3,
    "algorithm.online_filtering": False, "algorithm.filter_key": "overall", "algorithm.filter_low": 0.01,
    "algorithm.filter_high": 0.99, f"{ACTOR}global_batch_size": 256, MICRO: 4, f"{ACTOR}max_grad_norm": 1.0,
    f"{ACTOR}clip_ratio_low": 0.2, f"{ACTOR}clip_ratio_high": 0.3, f"{ACTOR}clip_ratio_dual": 3.0, AVERAGE: "token",
    LOSS: "default", f"{ACTOR}ppo_epochs": 1, f"{ACTOR}padding_free": True, f"{ACTOR}dynamic_batching": True,
    f"{ACTOR}tau_positive": 1.0, f"{ACTOR}tau_negative": 1.05, f"{MODEL}enable_gradient_checkpointing": True,
    f"{MODEL}trust_remote_code": True, f"{MODEL}freeze_vision_tower": False, f"{LORA}rank": 0, f"{LORA}alpha": 64,
    f"{LORA}target_modules": "all-linear", f"{OPTIM}lr": 1e-6, f"{OPTIM}betas": [0.9, 0.999],
    f"{OPTIM}weight_decay": 1e-2, f"{OPTIM}strategy": "adamw", f"{OPTIM}lr_warmup_ratio": 0.0,
    f"{OPTIM}lr_scheduler_type": "constant", f"{ROLLOUT}n": 1, f"{ROLLOUT}temperature": 1.0, f"{ROLLOUT}top_p": 1.0,
    f"{ROLLOUT}top_k": -1, f"{ROLLOUT}gpu_memory_utilization": 0.6, f"{ROLLOUT}tensor_parallel_size": 2,
    f"{VALIDATION}n": 1, "trainer.total_epochs": 15, "trainer.logger": ["console", "wandb"], "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8, "trainer.max_try_make_batch": 20, "trainer.val_freq": -1,
    "trainer.val_before_train": True, "trainer.save_freq": -1, "trainer.save_limit": -1,
}  # fmt: skip

SHIPPED: dict[str, Any] = {
    "data.train_files": "hiyouga/math12k@train", "data.val_files": "hiyouga/math12k@test", "data.prompt_key": "problem",
    "data.max_prompt_length": 2048, "data.max_response_length": 2048, "algorithm.use_kl_loss": True,
    "algorithm.kl_penalty": "low_var_kl", "algorithm.kl_coef": 1e-2, f"{ACTOR}global_batch_size": 128, MICRO: 1,
    f"{MODEL}trust_remote_code": False, f"{LORA}exclude_modules": ".*visual.*", f"{ROLLOUT}n": 5,
    f"{VALIDATION}temperature": 0.6, f"{VALIDATION}top_p": 0.95, "trainer.val_freq": 5, "trainer.save_freq": 5,
    "trainer.save_limit": 3, "data.format_prompt": "./examples/format_prompt/math.jinja",
    "worker.reward.reward_function": "./examples/reward_function/math.py:compute_score",
    f"{MODEL}model_path": "Qwen/Qwen2.5-7B-Instruct", "trainer.experiment_name": "qwen2_5_7b_math_grpo",
}  # fmt: skip
"""What the examples' config.yaml sets otherwise, for a script beside which it does not lie."""

OLD_KL = {"use_kl_loss": f"{ACTOR}use_kl_loss", "kl_coef": f"{ACTOR}kl_loss_coef", "kl_penalty": f"{ACTOR}kl_loss_type"}
OLD_KEYS = {"epochs": "trainer.total_episodes", "val": "trainer.test_freq", "low": f"{ACTOR}clip_ratio",
            "high": f"{ACTOR}clip_ratio", "warmup_ratio": f"{OPTIM}lr_warmup_steps_ratio",
            "schedule": f"{OPTIM}warmup_style"}  # fmt: skip
EARLY: dict[str, Any] = {
    "algorithm.adv_estimator": "gae", **dict(zip(OLD_KL.values(), (True, 1e-3, "low_var_kl"), strict=True)),
    **dict(zip(OLD_KEYS.values(), (10, -1, 0.2, 0.2, 0.0, "constant"), strict=True)), f"{ACTOR}entropy_coeff": 1e-3,
    f"{ACTOR}clip_ratio_dual": None, f"{ROLLOUT}gpu_memory_utilization": 0.5, f"{ACTOR}dynamic_batching": False,
    "data.filter_overlong_prompts": False,
}  # fmt: skip
"""Defaults of 02/2025 that differ, under its names."""
EARLY_MARKS = (*OLD_KL.values(), "trainer.total_episodes", "trainer.test_freq", "worker.reward.compute_score")

SAME = {
    f"{MODEL}model_path": "model.name_or_path", f"{MODEL}trust_remote_code": "model.trust_remote_code",
    f"{MODEL}freeze_vision_tower": "model.freeze_vision_tower", f"{ROLLOUT}max_model_len": "vllm.max_model_len",
    f"{MODEL}override_config.attn_implementation": "model.attn_implementation",
    f"{MODEL}enable_gradient_checkpointing": "grpo.gradient_checkpointing", f"{ACTOR}entropy_coeff": "grpo.entropy_coef",
    f"{ACTOR}max_grad_norm": "grpo.max_grad_norm", f"{OPTIM}lr": "grpo.learning_rate",
    f"{OPTIM}weight_decay": "grpo.weight_decay", f"{ROLLOUT}temperature": "grpo.temperature", "data.seed": "grpo.seed",
    f"{ROLLOUT}top_p": "grpo.top_p", "data.shuffle": "grpo.shuffle_dataset", "data.image_dir": "data.image_root",
    "data.max_pixels": "data.max_pixels", "data.min_pixels": "data.min_pixels", "data.system_prompt": "data.system_prompt",
}  # fmt: skip

SPLIT = "where FSDP puts weights; see `grpo.fsdp` and `grpo.deepspeed` for several GPUs"
WORDS: Mapping[str, tuple[Verdict, str]] = {
    **dict.fromkeys((f"{ACTOR}fsdp.", f"{ACTOR}offload.", f"{ACTOR}strategy", "worker.ref.", "worker.hybrid_engine"), ("speed only", SPLIT)),
    f"{ACTOR}padding_free": ("speed only", "TRL pads a micro batch to its longest completion"),
    f"{ACTOR}dynamic_batching": ("speed only", "a micro batch of the source holds more completions where they are short"),
    f"{ACTOR}micro_batch_size_per_device_for_experience": ("speed only", "TRL's passes without gradient use per_device_train_batch_size"),
    f"{ACTOR}use_torch_compile": ("speed only", "see `grpo.torch_compile`"), f"{MODEL}tokenizer_path": ("no equivalent", "the model's own is taken"),
    f"{MODEL}override_config.": ("no equivalent", "the checkpoint's own configuration holds"),
    f"{OPTIM}training_steps": ("same", "the source sets it when it starts"), ROLLOUT: ("speed only", "of the engine"),
    f"{ROLLOUT}ignore_eos": ("no equivalent", "completions end at the end token"), f"{ROLLOUT}do_sample": ("same", "sampling"),
    **dict.fromkeys(("worker.critic.", "trainer.critic_warmup", "algorithm.gamma", "algorithm.lam"), ("same", "PPO's, without effect with grpo")),
    **dict.fromkeys((f"algorithm.kl_{name}" for name in ("type", "horizon", "target")), ("same", "of KL in the reward")),
    "algorithm.filter_": ("same", "of the filter, in its row"), "data.video_": ("same", "rows with videos are not read here"),
    **dict.fromkeys(("data.val_batch_size", "data.mini_rollout_batch_size", "data.filter_overlong_prompts_workers", "data.return_raw_"), ("speed only", "workers and portions")),
    "worker.reward.": ("speed only", "how the reward is called"), "trainer.": ("speed only", "no part of what is learned"),
    "trainer.save_model_only": ("no equivalent", "checkpoints hold the optimizer, so that training can go on"), "config": ("same", "the file that the others come from"),
    "trainer.val_only": ("no equivalent", "grpo-autotune eval evaluates alone"), "trainer.load_checkpoint_path": ("no equivalent", "grpo-autotune train --resume goes on from its own checkpoints"),
}  # fmt: skip


def translate(source: Source, version: str | None = None, world_size: int | None = None) -> Translation:
    """The file's settings with EasyR1's defaults, each with its verdict. ConfigError for what TRL cannot train."""
    if version not in (None, "2025.2", "2026.7"):
        raise ConfigError(
            f"{version!r} is no version of EasyR1", where="--source-version", fix="Known: 2025.2, 2026.7."
        )
    mark = next((key for key in EARLY_MARKS if key in source.settings), None)
    is_early = version == "2025.2" if version else mark is not None
    reason = "--source-version" if version else f"it has the key {mark}" if mark else "assumed, as no key tells"
    lacks_base = "config" in source.settings and not any(setting.file for setting in source.settings.values())
    base = SHIPPED if lacks_base and not is_early else {}
    t = Translation(
        source, DEFAULTS | (EARLY if is_early else {}) | base, "2025.2" if is_early else "2026.7", reason, world_size
    )
    if lacks_base:
        t.warnings.append(
            f"{t.value('config')} is not here: {'the classes' if is_early else 'the shipped file'}' values are assumed"
        )
    keys = replace(KEYS, **OLD_KEYS) if is_early else KEYS
    estimator = t.value(keys.estimator)
    if estimator != "grpo":
        refuse(t, keys.estimator, f"advantages by {estimator} are not GRPO's", "Only grpo can be read.")
    t.same(
        keys.estimator,
        "grpo.scale_rewards",
        "group",
        "EasyR1 adds 1e-6 to the deviation, TRL 1e-4: 0.02 % at a deviation of 0.5",
    )
    shards = [
        next(
            (key for key in (f"{ACTOR}ulysses_size", f"{ACTOR}ulysses_sequence_parallel_size") if t.given(key)),
            f"{ACTOR}ulysses_size",
        )
    ]
    micro = t.number(MICRO)
    if micro < 1:
        refuse(t, MICRO, "no size of a micro batch")
    shared.batch(t, keys, int(micro), shared.devices(t, keys, shards), [MICRO], "")
    modules = t.value(keys.adapted)
    adapted = (
        modules
        if modules == "all-linear" or not isinstance(modules, str)
        else [name.strip() for name in modules.split(",")]
    )
    is_lora = shared.adapter(t, keys, adapted)
    _loss(t, keys, is_early)
    _kl(t, is_early)
    _optimizer(t, keys)
    shared.weights(t, f"{ACTOR}fsdp.torch_dtype", is_lora)
    shared.engine(t, keys, f"{ROLLOUT}gpu_memory_utilization")
    t.set("vllm.enable_sleep_mode", True, "EasyR1's engine always sleeps while weights are trained")
    t.set("vllm.sleep_level", 1)
    if t.number(f"{ROLLOUT}limit_images"):
        t.same(f"{ROLLOUT}limit_images", "vllm.limit_mm_per_prompt.image")
    for name in ("max_num_batched_tokens", "max_num_seqs", "enforce_eager", "enable_chunked_prefill"):
        if t.given(ROLLOUT + name):
            t.speed(ROLLOUT + name, "", {f"vllm.{name}": t.value(ROLLOUT + name)})
    _data(t, keys)
    for part in (shared.length, shared.saving, shared.naming):
        part(t, keys)
    shared.renamed(t, SAME)
    shared.explain(t, WORDS)
    return t


def _loss(t: Translation, keys: Keys, is_early: bool) -> None:
    """Form and averaging of the loss, whose micro batches EasyR1 weighs by their tokens."""
    kind, average = str(t.value(LOSS)), t.value(AVERAGE)
    if kind not in ("default", "gspo", "gspo_token", "cispo", "sapo"):
        refuse(t, LOSS, f"TRL has no loss like {kind}")
    shared.clipping(t, keys, kind if kind in ("cispo", "sapo") else "clip", not is_early)
    batch, steps = t.batch, t.values["grpo.steps_per_generation"]
    assert batch is not None
    level = {"grpo.importance_sampling_level": "sequence"} if kind.startswith("gspo") else {}
    form = kind if kind in ("cispo", "sapo") else {"token": "bnpo" if is_early else "dapo", "seq": "grpo"}[str(average)]
    for sign in ("positive", "negative") if kind == "sapo" else ():
        t.same(f"{ACTOR}tau_{sign}", f"grpo.sapo_temperature_{sign[:3]}")
    if form == "sapo" or average == "seq":
        note = (
            "TRL averages SAPO per sequence, EasyR1 over tokens"
            if form == "sapo" and average == "token"
            else (
                "EasyR1 weighs each micro batch's mean over sequences by its tokens: with 1 sequence in it that is the mean over tokens"
            )
        )
    elif is_early:
        same = batch.micro_batch == t.values["grpo.per_device_train_batch_size"]
        note = "" if same else f"the mean over the tokens of a micro batch, which had {batch.micro_batch} completions"
    else:
        note = (
            ""
            if steps == t.values["grpo.gradient_accumulation_steps"]
            else (
                f"TRL divides by the tokens of the rollout's mean step, EasyR1 by the step's own: gradients of a step differ by about {shared.spread(batch.completions)}"
            )
        )
    t.converted(LOSS, {"grpo.loss_type": form, **level}, "")
    (t.changes if note else t.converted)(AVERAGE, {"grpo.loss_type": form}, note)


def _kl(t: Translation, is_early: bool) -> None:
    switch, coefficient, estimator = OLD_KL.values() if is_early else (f"{ALGORITHM}{name}" for name in OLD_KL)
    if on(t.value(f"{ALGORITHM}disable_kl")):
        t.converted(f"{ALGORITHM}disable_kl", {"grpo.beta": 0.0}, "no reference model")
        for key in (switch, coefficient, estimator):
            t.inert(key, "without effect, as disable_kl is on")
        return
    if not on(t.value(switch)) and t.number(f"{ALGORITHM}kl_coef"):
        t.dropped(
            switch,
            f"KL in the reward, weight {t.number(f'{ALGORITHM}kl_coef'):g}: TRL has it in the loss alone (grpo.beta)",
        )
        return
    shared.kl(t, switch, coefficient, estimator)
    for name in ("kl_coef", "kl_penalty") if is_early else ():
        t.inert(f"{ALGORITHM}{name}", "KL in the reward, which is off")


def _optimizer(t: Translation, keys: Keys) -> None:
    shared.schedule(t, keys)
    betas, strategy = t.value(f"{OPTIM}betas"), f"{OPTIM}strategy"
    t.converted(f"{OPTIM}betas", {"grpo.adam_beta1": betas[0], "grpo.adam_beta2": betas[1]}, "")
    if t.value(strategy) == "adamw":
        t.inert(strategy, "TRL's default as well")
    else:
        t.changes(
            strategy,
            {},
            "EasyR1 keeps the optimizer's state in bfloat16 with Kahan's correction; TRL's AdamW rounds small updates of bfloat16 weights away",
        )


def _data(t: Translation, keys: Keys) -> None:
    shared.prompts(t, keys)
    columns: dict[str, str] = {}
    extra: dict[str, Any] = {}
    has_template = _template(t, "data.format_prompt", "data.prompt_template", extra)
    _template(t, "data.override_chat_template", "data.chat_template", {})
    for ours, name in (
        ("content" if has_template else "prompt", "prompt_key"),
        ("answer", "answer_key"),
        ("images", "image_key"),
    ):
        column = t.value(f"data.{name}")
        if column != ours:
            columns[ours] = str(column)
        t.inert(f"data.{name}", f"the column {column}")
    shared.files(t, keys, columns, extra)
    sampling = {
        name: (f"{VALIDATION}{name}", t.value(f"{VALIDATION}{name}")) for name in ("temperature", "top_p", "top_k")
    }
    shared.evaluation(t, keys, sampling, (f"{VALIDATION}n", int(t.number(f"{VALIDATION}n"))))
    if on(t.value("algorithm.online_filtering")):
        low, high, most = (
            t.number(key) for key in ("algorithm.filter_low", "algorithm.filter_high", "trainer.max_try_make_batch")
        )
        note = f"EasyR1 keeps groups whose mean of {t.value('algorithm.filter_key')} is between {low:g} and {high:g}, here those stay whose rewards differ"
        t.changes("algorithm.online_filtering", {"resample.max_rounds": int(most) if most > 1 else 10}, note)


def _template(t: Translation, key: str, target: str, extra: dict[str, Any]) -> bool:
    """A file of Jinja, if it lies beside the source; True if so, and then also in `extra`, without the section."""
    named = t.value(key)
    if named is None:
        return False
    file = beside(t.source.path, str(named))
    if file is None:
        t.dropped(key, f"{named} is not here: put its text into {target}, prompts are as they are without it")
        return False
    extra[target.partition(".")[2]] = str(file)
    t.same(key, target, str(file), "its `content` is the column of the prompt" if extra else "")
    return True
