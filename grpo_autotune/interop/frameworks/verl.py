"""verl: shell scripts with Hydra's overrides, and copies of its ppo_trainer.yaml."""

import math
from dataclasses import replace
from typing import Any

from grpo_autotune.config.sections.vllm import ENGINE_FIXED
from grpo_autotune.config.vllm_names import NAMES
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import rollout_trainers as shared
from grpo_autotune.interop.frameworks.rollout_trainers import Keys, on, refuse
from grpo_autotune.interop.frameworks.verl_defaults import (
    ACTOR, CHANGED, CORRECTION, FAST, FILTER, FSDP, LEGACY, MARKS, MODEL, NEWEST, OPTIM, ROLLOUT, SAME, WORDS,
)  # fmt: skip
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

KEYS = Keys(
    group=f"{ROLLOUT}n", prompts="data.train_batch_size", mini=f"{ACTOR}ppo_mini_batch_size", passes=f"{ACTOR}ppo_epochs",
    nodes="trainer.nnodes", gpus="trainer.n_gpus_per_node", estimator="algorithm.adv_estimator",
    low=f"{ACTOR}clip_ratio_low", high=f"{ACTOR}clip_ratio_high", dual=f"{ACTOR}clip_ratio_c",
    warmup_steps=f"{OPTIM}lr_warmup_steps", warmup_ratio=f"{OPTIM}lr_warmup_steps_ratio",
    schedule=f"{OPTIM}lr_scheduler_type", least_rate=f"{OPTIM}min_lr_ratio", epochs="trainer.total_epochs",
    steps="trainer.total_training_steps", save="trainer.save_freq", keep="trainer.max_actor_ckpt_to_keep",
    val="trainer.test_freq", val_first="trainer.val_before_train", logger="trainer.logger", run="trainer.experiment_name",
    rank=f"{MODEL}lora_rank", alpha=f"{MODEL}lora_alpha", adapted=f"{MODEL}target_modules",
    kept_out=f"{MODEL}exclude_modules", parallel=f"{ROLLOUT}tensor_model_parallel_size", top_k=f"{ROLLOUT}top_k",
    longest_prompt="data.max_prompt_length", longest_completion="data.max_response_length",
    filter_prompts="data.filter_overlong_prompts", overflow="data.truncation",
)  # fmt: skip

SEQUENCE_SHARDS = (f"{ACTOR}ulysses_sequence_parallel_size", f"{FSDP}ulysses_sequence_parallel_size",
                   f"{ACTOR}veomni.ulysses_parallel_size", f"{ACTOR}megatron.context_parallel_size")  # fmt: skip
MODEL_SHARDS = tuple(f"{ACTOR}megatron.{name}_model_parallel_size" for name in ("tensor", "pipeline"))
OTHER_PROGRAMS = ("sft", "generation", "eval", "prime", "sppo", "spin", "async", "distill")
"""Words in the names of verl's programs that train something else, or in another order."""

REFUSED = {
    f"{ROLLOUT}multi_turn.enable": "rollouts of several turns and tools are not read",
    "reward_model.enable": "a reward model that verl serves is not read; write a judge or service reward by hand",
    "reward.reward_model.enable": "a reward model that verl serves is not read; write a judge or service reward by hand",
    "distillation.enabled": "distillation is another loss than GRPO's",
    "algorithm.use_pf_ppo": "PF-PPO draws its batch in another way than GRPO",
}
"""Switches that make it something else."""

AVERAGES = {"seq-mean-token-mean": "grpo", "seq-mean-token-sum": "luspo", "seq-mean-token-sum-norm": "dr_grpo"}
FORMS = {"vanilla": "clip", "gspo": "clip", "cispo": "cispo", "sapo": "sapo"}
AVERAGE, LOSS = f"{ACTOR}loss_agg_mode", f"{ACTOR}policy_loss.loss_mode"


def translate(source: Source, version: str | None = None, world_size: int | None = None) -> Translation:
    """The file's settings with verl's defaults, each with its verdict. ConfigError for what TRL cannot train."""
    name, reason = chosen(source, version)
    t = Translation(source, NEWEST | CHANGED[name], name, reason, world_size)
    _check(t)
    _batch(t)
    is_lora = shared.adapter(t, KEYS, t.value(KEYS.adapted))
    keys = _keys_of_clipping(t)
    shared.clipping(t, keys, FORMS[t.value(LOSS)], t.value(LOSS) == "vanilla")
    _loss(t)
    shared.kl(t, f"{ACTOR}use_kl_loss", f"{ACTOR}kl_loss_coef", f"{ACTOR}kl_loss_type")
    note = "verl adds 1e-6 to the deviation, TRL 1e-4: 0.02 % at a deviation of 0.5"
    scaled = "group" if on(t.value("algorithm.norm_adv_by_std_in_grpo")) else "none"
    t.same("algorithm.norm_adv_by_std_in_grpo", "grpo.scale_rewards", scaled, note if scaled == "group" else "")
    _correction(t)
    _optimizer(t)
    shared.weights(t, f"{FSDP}model_dtype", is_lora)
    _engine(t, is_lora)
    _data(t)
    for part in (shared.length, shared.saving, shared.naming):
        part(t, KEYS)
    shared.renamed(t, SAME)
    shared.explain(t, WORDS)
    return t


def chosen(source: Source, version: str | None) -> tuple[str, str]:
    """The row of `CHANGED` for a version, a release number or the file's own keys, and why it was taken."""
    pin = version or source.hints.get("verl")
    if pin in CHANGED:
        return str(pin), "--source-version"
    if pin:
        try:
            release = tuple(int(part) for part in pin.lstrip("v").split(".")[:2])
        except ValueError:
            fix = f"Known: {', '.join(CHANGED)}, or a release such as 0.7."
            raise ConfigError(f"{pin!r} is no version of verl", where="--source-version", fix=fix) from None
        name = (
            "2025.3" if release < (0, 4) else "2025" if release < (0, 5) else "2026.1" if release < (0, 8) else "2026.8"
        )
        return name, f"release {pin}" + ("" if version else ", pinned by the file")
    if source.program and source.program.startswith("recipe.dapo.src"):
        return "2025.3", f"it starts {source.program}"
    for name, marks in MARKS:
        mark = next(
            (key for key in source.settings if key in marks or key.startswith(tuple(m for m in marks if m[-1] == "."))),
            None,
        )
        if mark is not None:
            return name, f"it has the key {mark}"
    return "2026.8", "assumed, as no key tells; --source-version says another"


def _check(t: Translation) -> None:
    program = (t.source.program or "").lower()
    if any(word in program for word in OTHER_PROGRAMS):
        raise ConfigError(
            f"{t.source.program} does not train by GRPO as verl.trainer.main_ppo does", where=t.source.path.name
        )
    estimator = t.value(KEYS.estimator)
    if estimator not in ("grpo", "grpo_vectorized"):
        is_default = "" if t.given(KEYS.estimator) else ", verl's default,"
        refuse(t, KEYS.estimator, f"advantages by {estimator}{is_default} are not GRPO's", "Only grpo can be read.")
    t.inert(KEYS.estimator, "the mean of a prompt's completions is the baseline")
    for key, what in REFUSED.items():
        if on(t.value(key)):
            refuse(t, key, what)
    agent = t.value(f"{ROLLOUT}agent.default_agent_loop")
    if agent not in (None, "single_turn_agent"):
        refuse(t, f"{ROLLOUT}agent.default_agent_loop", "rollouts of several turns and tools are not read")
    if t.value(LOSS) not in FORMS:
        refuse(t, LOSS, f"TRL has no loss like {t.value(LOSS)}", f"Read are {', '.join(FORMS)}.")
    mode = t.value("trainer.v1.trainer_mode")
    if mode not in (None, "sync"):
        t.dropped(
            "trainer.v1.trainer_mode", "rollouts beside training, from older weights: TRL waits for each other's end"
        )


def _batch(t: Translation) -> None:
    """The micro batch as completions: as given, or those of full length that fit into a budget of tokens."""
    sequence = [next((key for key in SEQUENCE_SHARDS if t.given(key)), SEQUENCE_SHARDS[0])]
    ranks = shared.devices(t, KEYS, [*sequence, *(key for key in MODEL_SHARDS if t.given(key))])
    budget, each, total = (
        f"{ACTOR}{name}"
        for name in ("ppo_max_token_len_per_gpu", "ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size")
    )
    dynamic = f"{ACTOR}use_dynamic_bsz"
    if on(t.value(dynamic)):
        longest = t.number(KEYS.longest_prompt) + t.number(KEYS.longest_completion)
        tokens = t.number(budget) * max(1, t.number(sequence[0], 1) or 1)
        micro = max(1, math.floor(tokens / longest))
        note = f"{tokens} tokens of a micro batch / {longest} of the longest completion with its prompt = {micro}"
        unused, used = [each, total], [budget, dynamic]
    else:
        key = each if t.value(each) is not None or t.value(total) is None else total
        micro = t.number(key)
        if micro is None:
            refuse(t, key, "no size of a micro batch, which verl needs as well")
        micro = int(micro) if key == each else max(1, int(micro) // ranks)
        note, used, unused = "", [key], [budget, dynamic, *{each, total} - {key}]
    for key in unused:
        if t.given(key):
            t.inert(key, f"without effect with {dynamic}: {str(on(t.value(dynamic))).lower()}")
    shared.batch(t, KEYS, micro, ranks, used, note)


def _keys_of_clipping(t: Translation) -> Keys:
    """Names of the bounds: the old one stands for those that are null."""
    old = f"{ACTOR}clip_ratio"
    low, high = (key if t.value(key) is not None else old for key in (KEYS.low, KEYS.high))
    if old not in (low, high) and t.given(old):
        t.inert(old, "verl ignores it, as clip_ratio_low and clip_ratio_high are not null")
    return replace(KEYS, low=low, high=high)


def _loss(t: Translation) -> None:
    """Form and averaging of the loss."""
    old, mode, average = f"{ACTOR}use_token_level_loss", t.value(LOSS), str(t.value(AVERAGE))
    key = old if t.given(old) and not t.given(AVERAGE) else AVERAGE
    if key == old:
        average = "token-mean" if on(t.value(old)) else "seq-mean-token-mean"
    targets = {"grpo.loss_type": mode if mode in ("cispo", "sapo") else "grpo"}
    if mode in ("gspo", "sapo"):
        if mode == "gspo":
            targets["grpo.importance_sampling_level"] = "sequence"
        for sign in ("pos", "neg") if mode == "sapo" else ():
            t.same(f"{ACTOR}tau_{sign}", f"grpo.sapo_temperature_{sign}")
        t.converted(LOSS, targets, "averaged per sequence, whatever loss_agg_mode says")
        t.inert(key, f"{mode} averages per sequence")
        return
    t.converted(LOSS, targets if mode == "cispo" else {}, "")
    is_legacy = on(t.value(LEGACY)) and t.value(LEGACY) != "disable"
    if t.given(LEGACY):
        t.inert(LEGACY, "decides the averaging of the loss, in its row")
    _average(t, key, average, targets["grpo.loss_type"] if mode == "cispo" else None, is_legacy)


def _average(t: Translation, key: str, average: str, fixed: str | None, is_legacy: bool) -> None:
    """The averaging of per-token losses as TRL's `loss_type`; `fixed` is one that the form of the loss asks for."""
    steps, accumulated = t.values["grpo.steps_per_generation"], t.values["grpo.gradient_accumulation_steps"]
    micro, batch = t.values["grpo.per_device_train_batch_size"], t.batch
    assert batch is not None
    kind, note = fixed or AVERAGES.get(average, "dapo"), ""
    if average == "token-mean" and is_legacy and on(t.value(f"{ACTOR}use_dynamic_bsz")):
        note = "verl averages over the tokens of each micro batch, which holds as many as fit; TRL over the optimizer step's"
    elif average == "token-mean" and is_legacy:
        kind = fixed or "bnpo"
        same = kind == "bnpo" and micro == batch.micro_batch
        note = (
            ""
            if same
            else f"verl averages over the tokens of each micro batch of {batch.micro_batch}, TRL over those of {micro if kind == 'bnpo' else 'the step'}"
        )
    elif average == "token-mean" and steps != accumulated:
        note = f"TRL divides by the tokens of the rollout's mean step, verl by the step's own: gradients of a step differ by about {shared.spread(batch.completions)}"
    elif average == "seq-mean-token-sum-norm" and (is_legacy or t.value(f"{ACTOR}loss_scale_factor")):
        note = f"gradients differ by a constant factor ({'the micro batch' if is_legacy else 'loss_scale_factor'}), which only max_grad_norm feels"
    elif average not in AVERAGES and average != "token-mean":
        note = f"TRL has no {average}: it averages over tokens"
    elif fixed and average != "token-mean":
        note = f"TRL averages {fixed} over tokens"
    (t.changes if note else t.same)(key, {"grpo.loss_type": kind} if note else "grpo.loss_type", note or kind)  # type: ignore[operator]
    if t.given(f"{ACTOR}loss_scale_factor"):
        t.inert(f"{ACTOR}loss_scale_factor", "in the row of the averaging")


def _correction(t: Translation) -> None:
    """Correction of the difference between the engine's log-probs and the trainer's."""
    level, cap, old = f"{CORRECTION}rollout_is", f"{CORRECTION}rollout_is_threshold", f"{ACTOR}tis_imp_ratio_cap"
    kind, limit = t.value(level), t.value(cap)
    if (t.number(old) or -1) > 0:
        kind, level, limit = "token", old, t.value(old)
    if kind not in ("token", "sequence"):
        t.converted(level, {"grpo.vllm_importance_sampling_correction": False}, "off, where TRL's default is on")
        return
    low, _, high = str(limit).rpartition("_")
    form = f"{kind}_{'mask' if low else 'truncate'}"
    values: dict[str, Any] = {
        "grpo.vllm_importance_sampling_mode": form,
        "grpo.vllm_importance_sampling_clip_max": float(high),
    }
    t.converted(level, {**values, **({"grpo.vllm_importance_sampling_clip_min": float(low)} if low else {})}, "")
    if t.given(cap):
        t.same(cap, "grpo.vllm_importance_sampling_clip_max", float(high))


def _optimizer(t: Translation) -> None:
    old, betas = f"{OPTIM}warmup_style", t.value(f"{OPTIM}betas")
    keys = replace(KEYS, schedule=old) if t.value(old) is not None else KEYS
    if not t.given(keys.schedule) and t.given(f"{OPTIM}lr_decay_style"):
        keys = replace(keys, schedule=f"{OPTIM}lr_decay_style")
    shared.schedule(t, keys)
    t.converted(f"{OPTIM}betas", {"grpo.adam_beta1": betas[0], "grpo.adam_beta2": betas[1]}, "")
    name = f"{OPTIM}optimizer"
    if t.given(name):
        is_adam = str(t.value(name)).lower() in ("adamw", "adam")
        (t.inert if is_adam else t.dropped)(name, "AdamW" if is_adam else "TRL takes AdamW here; see `grpo.optim`")


def _engine(t: Translation, is_lora: bool) -> None:
    shared.engine(t, KEYS, f"{ROLLOUT}gpu_memory_utilization")
    name = t.value(f"{ROLLOUT}name")
    t.speed(f"{ROLLOUT}name", "" if name == "vllm" else f"vLLM generates here, not {name}")
    sleeps = on(t.value(f"{ROLLOUT}free_cache_engine"))
    targets = {"vllm.enable_sleep_mode": True, "vllm.sleep_level": 1 if is_lora else 2} if sleeps else {}
    t.speed(
        f"{ROLLOUT}free_cache_engine",
        "the engine's memory is the trainer's while weights are trained" if sleeps else "",
        targets,
    )
    for key, target in FAST.items():
        if t.given(key) and t.value(key) is not None:
            t.speed(key, "", {target: t.value(key)})
    if t.value(f"{ROLLOUT}max_model_len") is not None:
        t.same(f"{ROLLOUT}max_model_len", "vllm.max_model_len")
    prefix = f"{ROLLOUT}engine_kwargs.vllm."
    for rest, value in shared.below(t, prefix).items():
        known = NAMES - ENGINE_FIXED.keys()
        if rest.partition(".")[0] in known and value is not None:
            t.speed(prefix + rest, "", {f"vllm.{rest}": value})
    for prefix, target in (
        ("data.apply_chat_template_kwargs.", "grpo.chat_template_kwargs"),
        ("data.mm_processor_kwargs.", "vllm.mm_processor_kwargs"),
    ):
        for rest in shared.below(t, prefix):
            t.same(prefix + rest, f"{target}.{rest}")


def _data(t: Translation) -> None:
    sampled = f"{ROLLOUT}val_kwargs."
    keys = {name: f"{sampled}{name}" for name in ("temperature", "top_p", "top_k")}
    sampling: dict[str, tuple[str, Any]] = {name: (key, t.value(key)) for name, key in keys.items()}
    sampling["top_k"] = (keys["top_k"], max(0, t.number(keys["top_k"]) or 0))
    if not on(t.value(f"{sampled}do_sample")):
        sampling = {"temperature": (f"{sampled}do_sample", 0)}
    shared.prompts(t, KEYS)
    columns = {"answer": "reward_model.ground_truth"}
    for ours, key in (("prompt", "data.prompt_key"), ("images", "data.image_key")):
        if t.value(key) != ours:
            columns[ours] = str(t.value(key))
        if t.given(key):
            t.inert(key, f"the column {t.value(key)}")
    shared.files(t, KEYS, columns)
    shared.evaluation(t, KEYS, sampling, (f"{sampled}n", int(t.number(f"{sampled}n") or 1)))
    for key, random, first in (
        ("train_max_samples", "subsample", "max_samples"),
        ("val_max_samples", "max_eval_samples", "max_eval_samples"),
    ):
        rows = t.number(f"data.{key}") or -1
        if rows > 0:
            t.same(f"data.{key}", f"data.{random if on(t.value('data.shuffle')) else first}", rows)
        elif t.given(f"data.{key}"):
            t.inert(f"data.{key}", "all rows")
    if on(t.value(f"{FILTER}enable")):
        most = int(t.number(f"{FILTER}max_num_gen_batches") or 0)
        note = "groups of equal rewards give their place to others" + (
            f"; verl looks at {t.value(f'{FILTER}metric')}, the result at the whole reward"
            if t.value(f"{FILTER}metric")
            else ""
        )
        t.converted(f"{FILTER}enable", {"resample.max_rounds": most if most > 1 else 10}, note)
