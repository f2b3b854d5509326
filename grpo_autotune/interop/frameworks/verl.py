"""verl: shell scripts with Hydra's overrides, and copies of its ppo_trainer.yaml.

Versions: 2025.3 (releases up to 0.3), 2025 (0.4), 2026.1 (0.5 to 0.7), 2026.8 (from 0.8). Defaults were read in
verl/trainer/config at 03150d4, 4e9586a, b178a3c and 1dda039.
"""

import re
from typing import Any

from grpo_autotune.config.sections.vllm import ENGINE_FIXED
from grpo_autotune.config.vllm_names import NAMES
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.adapters.named import overlong_penalty
from grpo_autotune.interop.frameworks import rollout_trainers as shared
from grpo_autotune.interop.frameworks.rollout_trainers import on, positive, refuse, unused
from grpo_autotune.interop.frameworks.rollout_words import keys_of, spelled
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{name}." for name in ("actor", "model", "rollout"))
OPTIM, FSDP = f"{ACTOR}optim.", f"{ACTOR}fsdp_config."
CORRECTION, FILTER = "algorithm.rollout_correction.", "algorithm.filter_groups."
LEGACY = "trainer.use_legacy_worker_impl"  # workers whose loss is the mean of a micro batch, not of the step

KEYS = keys_of("verl")
NEWEST: dict[str, Any] = spelled("verl", {  # defaults that matter
    "data.train_files": "~/data/rlhf/gsm8k/train.parquet", "data.val_files": "~/data/rlhf/gsm8k/test.parquet",
    "data.train_batch_size": 1024, "data.max_prompt_length": 512, "data.max_response_length": 512,
    "data.filter_overlong_prompts": False, "data.truncation": "error", "data.shuffle": True,
    "data.prompt_key": "prompt", "data.image_key": "images", "data.reward_fn_key": "data_source",
    "algorithm.adv_estimator": "gae", "algorithm.norm_adv_by_std_in_grpo": True, "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.rollout_is": None, "algorithm.rollout_correction.rollout_is_threshold": 2.0,
    "model.path": "~/models/deepseek-llm-7b-chat", "model.enable_gradient_checkpointing": True, "model.lora_rank": 0,
    "model.lora_alpha": 16, "model.target_modules": "all-linear", "actor.ppo_mini_batch_size": 256,
    "actor.ppo_max_token_len_per_gpu": 16384, "actor.use_dynamic_bsz": False, "actor.ppo_epochs": 1,
    "actor.clip_ratio": 0.2, "actor.clip_ratio_low": 0.2, "actor.clip_ratio_high": 0.2, "actor.clip_ratio_c": 3.0,
    "actor.loss_agg_mode": "token-mean", "actor.policy_loss.loss_mode": "vanilla", "actor.tau_pos": 1.0,
    "actor.tau_neg": 1.05, "actor.entropy_coeff": 0, "actor.use_kl_loss": False, "actor.kl_loss_coef": 0.001,
    "actor.kl_loss_type": "low_var_kl", "actor.grad_clip": 1.0, "actor.fsdp_config.model_dtype": "fp32",
    "optim.lr": 1e-6, "optim.weight_decay": 0.01, "optim.betas": [0.9, 0.999], "optim.lr_warmup_steps": -1,
    "optim.lr_warmup_steps_ratio": 0.0, "optim.lr_scheduler_type": "constant", "optim.min_lr_ratio": 0.0,
    "rollout.n": 1, "rollout.name": "vllm", "rollout.temperature": 1.0, "rollout.top_p": 1.0, "rollout.top_k": -1,
    "rollout.gpu_memory_utilization": 0.5, "rollout.tensor_model_parallel_size": 2, "rollout.free_cache_engine": True,
    "rollout.val_kwargs.n": 1, "rollout.val_kwargs.temperature": 0, "rollout.val_kwargs.do_sample": False,
    "rollout.val_kwargs.top_p": 1.0, "rollout.val_kwargs.top_k": -1, "trainer.nnodes": 1, "trainer.n_gpus_per_node": 8,
    "trainer.total_epochs": 30, "trainer.save_freq": -1, "trainer.test_freq": -1, "trainer.val_before_train": True,
    "trainer.logger": ["console", "wandb"], "custom_reward_function.name": "compute_score",
    LEGACY: "disable",
})  # fmt: skip
CHANGED: dict[str, dict[str, Any]] = {  # version -> defaults that differ from the newest
    "2026.8": {},
    "2026.1": {LEGACY: "auto"},
    "2025": {LEGACY: "auto", f"{ROLLOUT}enforce_eager": True, f"{ROLLOUT}max_num_seqs": 1024},
    "2025.3": {
        LEGACY: "auto", f"{ACTOR}clip_ratio_c": None, f"{ACTOR}entropy_coeff": 1e-3, "algorithm.kl_ctrl.kl_coef": 1e-3,
    },
}  # fmt: skip
RELEASES = (((0, 4), "2025.3"), ((0, 5), "2025"), ((0, 8), "2026.1"), ((99,), "2026.8"))  # first that is too new
LOOPS = ("2026.1", "2026.8")  # versions whose agent loop fixes repetition_penalty and reads part of `val_kwargs`

MARKS = (  # keys, beginnings of keys, or variables that only such a version has; the first that a file has decides
    ("2025.3", f"{ACTOR}use_token_level_loss custom_reward_function.overlong_buffer."),
    ("2026.8", "trainer.use_v1 trainer.v1. reward. distillation. transfer_queue. model_engine data.audio_key "
               f"data.mm_processor_kwargs skip. ray_kwargs.ray_init.runtime_env. {ROLLOUT}checkpoint_engine."),
    ("2026.1", f"{LEGACY} reward_manager. data.sampler. data.datagen. {ROLLOUT}skip_rollout"),
    ("2025", f"{OPTIM}warmup_style ray_init. {ACTOR}checkpoint.contents {ROLLOUT}chat_scheduler "
             f"reward_model.overlong_buffer. {ACTOR}ppo_micro_batch_size {ROLLOUT}log_prob_micro_batch_size "
             "VLLM_ATTENTION_BACKEND=XFORMERS"),
    ("2026.1", "reward_model. custom_reward_function."),
)  # fmt: skip

AVERAGE, LOSS, DYNAMIC = f"{ACTOR}loss_agg_mode", f"{ACTOR}policy_loss.loss_mode", f"{ACTOR}use_dynamic_bsz"
OLD_SCHEDULES = (f"{OPTIM}warmup_style", f"{OPTIM}lr_decay_style", f"{OPTIM}decay_type")
LEAST_RATES = (f"{OPTIM}min_lr", f"{OPTIM}lr_min")  # Megatron's and VeOmni's, in place of a share
SCHEDULES: dict[str, dict[str, Any]] = {  # by the engine, where it is not FSDP's
    "veomni": {KEYS.schedule: "cosine"}, "automodel": {KEYS.schedule: "cosine", KEYS.least_rate: 0.01},
    "torchtitan": {f"{OPTIM}decay_type": "linear"},
}  # fmt: skip
CLIPS = (f"{ACTOR}grad_clip", f"{OPTIM}clip_grad")  # of the old workers for FSDP, and of all others
TURNS = f"{ROLLOUT}multi_turn."
SEQUENCE_SHARDS = (f"{ACTOR}ulysses_sequence_parallel_size", f"{FSDP}ulysses_sequence_parallel_size",
                   f"{ACTOR}veomni.ulysses_parallel_size", f"{ACTOR}megatron.context_parallel_size",
                   f"{ACTOR}torchtitan.context_parallel_size", f"{ACTOR}engine.cp")  # fmt: skip
MODEL_SHARDS = (f"{ACTOR}megatron.tensor_model_parallel_size", f"{ACTOR}megatron.pipeline_model_parallel_size",
                f"{ACTOR}torchtitan.tensor_parallel_size", f"{ACTOR}torchtitan.pipeline_parallel_size",
                f"{ACTOR}engine.tp", f"{ACTOR}engine.pp")  # fmt: skip
OLDER = "rollouts of older weights beside training: TRL takes turns"
OTHER_PROGRAMS = re.compile(r"sft|generation|eval|prime|sppo|spin|async|distill")  # verl's, for something else
SEVERAL_TURNS = "rollouts of several turns and tools are not read"
SERVED = "a reward model that verl serves is not read; write a judge or service reward by hand"
FUNCTIONS = ("reward.custom_reward_function.", "custom_reward_function.")
MANAGERS = ("reward.reward_manager.name", "reward_model.reward_manager", "reward_manager.name")
BUFFERS = ("reward.reward_kwargs.overlong_buffer_cfg.", "reward_model.reward_kwargs.overlong_buffer_cfg.",
           "reward_model.overlong_buffer.", "custom_reward_function.overlong_buffer.")  # fmt: skip
KWARGS = {"data.apply_chat_template_kwargs.": "grpo.chat_template_kwargs",
          "data.mm_processor_kwargs.": "vllm.mm_processor_kwargs"}  # fmt: skip
REFUSED = {  # settings that make it something else
    **dict.fromkeys((f"{TURNS}enable", f"{TURNS}tool_config_path", f"{TURNS}interaction_config_path"), SEVERAL_TURNS),
    **dict.fromkeys(("reward_model.enable", "reward.reward_model.enable"), SERVED),
    "distillation.enabled": "distillation is another loss than GRPO's",
    "algorithm.use_pf_ppo": "PF-PPO draws its batch in another way than GRPO",
}
AVERAGES = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum": "luspo",
            "seq-mean-token-sum-norm": "dr_grpo"}  # fmt: skip
FORMS = {"vanilla": "clip", "gspo": "clip", "cispo": "cispo", "sapo": "sapo"}


def translate(source: Source, version: str | None = None, world_size: int | None = None) -> Translation:
    """The file's settings with verl's defaults, each with its verdict. ConfigError for what TRL cannot train."""
    name, reason = chosen(source, version)
    places = ("model_engine", f"{ACTOR}strategy", f"{ACTOR}model_engine")
    engines = {str(source.settings[key].value) for key in places if key in source.settings}
    schedules = {key: value for engine in engines for key, value in SCHEDULES.get(engine, {}).items()}
    t = Translation(source, {**NEWEST, **CHANGED[name], **schedules}, name, reason, world_size)
    _check(t)
    _batch(t)
    is_lora = _lora(t)
    old = f"{ACTOR}clip_ratio"
    low, high = (key if t.value(key) is not None else old for key in (KEYS.low, KEYS.high))
    shared.clipping(t, KEYS._replace(low=low, high=high), FORMS[t.value(LOSS)], t.value(LOSS) == "vanilla")
    unused(t, [old], "verl ignores it, as clip_ratio_low and clip_ratio_high are not null")
    _loss(t)
    shared.kl(t, f"{ACTOR}use_kl_loss", f"{ACTOR}kl_loss_coef", f"{ACTOR}kl_loss_type")
    if name == "2025.3" and not on(t.value(f"{ACTOR}use_kl_loss")) and t.number("algorithm.kl_ctrl.kl_coef"):
        t.dropped("algorithm.kl_ctrl.kl_coef", "KL in the reward, as use_kl_loss is off: TRL has it in the loss alone")
    by_deviation = "algorithm.norm_adv_by_std_in_grpo"
    scale = ("group", shared.EPSILON) if on(t.value(by_deviation)) else ("none", "")
    t.same(by_deviation, "grpo.scale_rewards", *scale)
    _correction(t)
    older = (key for key in OLD_SCHEDULES if t.value(key) is not None and not t.given(KEYS.schedule))
    least = next(filter(t.value, LEAST_RATES), KEYS.least_rate)
    shared.schedule(t, KEYS._replace(schedule=next(older, KEYS.schedule), least_rate=least))
    unused(t, [*LEAST_RATES, KEYS.least_rate], f"{least} holds" if t.value(least) else "0 is no floor")
    is_megatron = t.value(f"{ACTOR}strategy") == "megatron" or shared.below(t, f"{ACTOR}megatron.")
    is_old = on(t.value(LEGACY)) and not is_megatron
    clip, other = CLIPS if is_old else CLIPS[::-1]
    shared.renamed(t, {clip: "grpo.max_grad_norm"})
    unused(t, [other], f"verl reads {clip}")
    shared.betas(t, f"{OPTIM}betas")
    if str(t.value(f"{OPTIM}optimizer")).lower() in ("adamw", "adam"):
        t.inert(f"{OPTIM}optimizer", "AdamW")
    shared.weights(t, f"{FSDP}model_dtype", is_lora)
    halves = [key for key in (f"{FSDP}dtype", f"{ACTOR}megatron.dtype") if str(t.value(key)) in ("float16", "fp16")]
    t.converted(halves, {"grpo.fp16": True, "grpo.bf16": False}, "arithmetic in float16")
    _engine(t, is_lora)
    _data(t)
    _rewards(t)
    shared.cadence(t, KEYS, ends_early=True)
    shared.naming(t, KEYS)
    shared.by_name(t)
    if t.value(f"{ROLLOUT}name") == "hf":
        _without_engine(t)
    shared.explain(t)
    return t


def chosen(source: Source, version: str | None) -> tuple[str, str]:
    """The row of `CHANGED` for a version, a release number or the file's own keys, and why it was taken."""
    pin = version or source.hints.get("verl")
    if pin in CHANGED:
        return str(pin), "--source-version"
    if pin:
        release = tuple(int(part) for part in re.findall(r"\d+", pin)[:2])
        if not re.fullmatch(r"v?0\.\d.*", pin):
            fix = f"Known: {', '.join(CHANGED)}, or a release such as 0.7."
            raise ConfigError(f"{pin!r} is no version of verl", where="--source-version", fix=fix)
        return next(name for end, name in RELEASES if release < end), f"release {pin}"
    if (source.program or "").startswith("recipe.dapo.src"):
        return "2025.3", f"it starts {source.program}"
    variables = [f"{name}={setting.value}" for name, setting in source.environment.items()]
    for name, marks in MARKS:
        starts = tuple(mark for mark in marks.split() if mark[-1] == ".")
        places = (*source.settings, *variables)
        mark = next((key for key in places if key in marks.split() or key.startswith(starts)), None)
        if mark is not None:
            return name, f"it has {'' if mark in variables else 'the key '}{mark}"
    return "2026.8", "assumed, as no key tells; --source-version says another"


def _check(t: Translation) -> None:
    program, estimator = t.source.program or "", t.value("algorithm.adv_estimator")
    if OTHER_PROGRAMS.search(program.lower()):
        raise ConfigError(f"{program} does not train by GRPO as verl.trainer.main_ppo does", where=t.source.path.name)
    if estimator not in ("grpo", "grpo_vectorized"):
        is_default = "" if t.given("algorithm.adv_estimator") else ", verl's default,"
        what = f"advantages by {estimator}{is_default} are not GRPO's"
        refuse(t, "algorithm.adv_estimator", what, "Only grpo can be read.")
    t.inert("algorithm.adv_estimator", "the mean of a prompt's completions is the baseline")
    for key, what in REFUSED.items():
        if on(t.value(key)) and not (key.startswith(TURNS) and t.value(f"{TURNS}enable") is False):
            refuse(t, key, what)
    if t.value(f"{ROLLOUT}agent.default_agent_loop", "single_turn_agent") != "single_turn_agent":
        refuse(t, f"{ROLLOUT}agent.default_agent_loop", SEVERAL_TURNS)
    if str(t.value(LOSS)) not in FORMS:
        refuse(t, LOSS, f"TRL has no loss like {t.value(LOSS)}", f"Read are {', '.join(FORMS)}.")
    if t.value("trainer.v1.trainer_mode", "sync") != "sync":
        t.dropped("trainer.v1.trainer_mode", OLDER)
    if not on(t.value("actor_rollout_ref.hybrid_engine", True)):
        t.dropped("actor_rollout_ref.hybrid_engine", OLDER)
    unused(t, ["actor_rollout_ref.hybrid_engine"], "trainer and engine share the GPUs")


def _batch(t: Translation) -> None:
    """The micro batch as completions: as given, or those of full length that fit into a budget of tokens."""
    sequence = next((key for key in SEQUENCE_SHARDS if t.given(key)), SEQUENCE_SHARDS[0])
    ranks = shared.devices(t, KEYS, [sequence, *filter(t.given, MODEL_SHARDS)])
    names = ("max_token_len_per_gpu", "micro_batch_size_per_gpu", "micro_batch_size")
    budget, each, total = (f"{ACTOR}ppo_{name}" for name in names)
    if on(t.value(DYNAMIC)):
        longest = shared.count(t, KEYS.longest_prompt) + shared.count(t, KEYS.longest_completion)
        tokens = shared.count(t, budget)
        micro, used = max(1, tokens // max(1, longest)), [budget, DYNAMIC]
        note = f"{tokens} tokens of a micro batch / {longest} of the longest completion with its prompt"
    else:
        used = [total if t.value(each) is None and t.value(total) is not None else each]
        size = t.number(used[0])
        if size is None:
            refuse(t, each, "no size of a micro batch, which verl needs as well")
        micro, note = max(1, int(size) // (ranks if used == [total] else 1)), ""
    unused(t, {DYNAMIC} - {*used}, "off")
    unused(t, {budget, each, total} - {*used}, f"without effect with {DYNAMIC} {str(on(t.value(DYNAMIC))).lower()}")
    prompts, fetched = KEYS.prompts, "data.gen_batch_size"
    if t.version in ("2025", "2026.1") and t.value(fetched) is not None and not _is_filtering(t):
        prompts = fetched
        unused(t, [KEYS.prompts], f"{fetched} goes before it, as no group is filtered")
    shared.batch(t, KEYS._replace(prompts=prompts), micro, ranks, used, note)


def _is_filtering(t: Translation) -> bool:
    """True if groups without a difference are drawn again, which only the recipes of some versions can."""
    is_plain = t.version in ("2025", "2026.1") and (t.source.program or "").endswith("verl.trainer.main_ppo")
    return on(t.value(f"{FILTER}enable")) and not is_plain


def _lora(t: Translation) -> bool:
    start = f"{MODEL}lora_adapter_path"
    if on(t.value(start)):
        note = "goes on from it; the reference is the base model, as in verl"
        t.verdict("same", start, {"model.adapter": t.value(start), "model.adapter_reference": "base"}, note)
        unused(t, (KEYS.rank, KEYS.alpha, KEYS.adapted, KEYS.kept_out), "the adapter's own configuration holds")
        return True
    if not positive(t, f"{MODEL}lora.rank"):
        megatrons = shared.below(t, f"{MODEL}lora.").keys() - {"merge"}
        unused(t, (f"{MODEL}lora.{name}" for name in megatrons), "Megatron's LoRA, which is off")
    return shared.lora(t, KEYS, t.value(KEYS.adapted))


def _loss(t: Translation) -> None:
    old, mode = f"{ACTOR}use_token_level_loss", t.value(LOSS)
    key = old if t.given(old) and not t.given(AVERAGE) else AVERAGE
    average = str(t.value(AVERAGE)) if key == AVERAGE else "token-mean" if on(t.value(old)) else "seq-mean-token-mean"
    unused(t, [LEGACY, f"{ACTOR}loss_scale_factor"], "in the row of the averaging")
    if average not in (*AVERAGES, "token-sum"):
        refuse(t, key, f"no average of a loss like {average}", f"Read are {', '.join(AVERAGES)}.")
    if mode in ("gspo", "sapo"):
        level = {"grpo.importance_sampling_level": "sequence"} if mode == "gspo" else {}
        targets = {"grpo.loss_type": "grpo" if mode == "gspo" else "sapo", **level}
        t.converted(LOSS, targets, f"averaged per sequence, whatever {key} says")
        t.inert(key, f"{mode} averages per sequence")
        if on(t.value(f"{ACTOR}use_kl_loss")) and average != "seq-mean-token-mean":
            t.changes(key, {}, f"verl averages KL by {average} beside {mode}, TRL per sequence")
        if mode == "sapo":
            shared.renamed(t, {f"{ACTOR}tau_{sign}": f"grpo.sapo_temperature_{sign}" for sign in ("pos", "neg")})
        return
    t.converted(LOSS, {"grpo.loss_type": "cispo"} if mode == "cispo" else {})
    kind, note = _average(t, average, mode == "cispo")
    t.verdict("changes" if note else "same", key, {"grpo.loss_type": kind}, note)


def _average(t: Translation, average: str, is_cispo: bool) -> tuple[str, str]:
    assert t.batch is not None
    kind = "cispo" if is_cispo else AVERAGES.get(average, "dapo")
    source, micro = t.batch.micro_batch, t.values["grpo.per_device_train_batch_size"]
    is_legacy = on(t.value(LEGACY))
    if average == "token-mean" and not is_legacy:
        return kind, shared.uneven(t)
    if average == "token-mean":
        is_like = not is_cispo and not on(t.value(DYNAMIC))
        each = "as many completions as fit" if on(t.value(DYNAMIC)) else f"{source} completions"
        here = f"of {micro}" if is_like else "of the optimizer step"
        note = f"verl averages over the tokens of each micro batch of {each}, TRL over those {here}"
        return ("bnpo" if is_like else kind), "" if is_like and micro == source else note
    if is_cispo or average not in AVERAGES:
        return kind, f"verl averages by {average}, TRL's {kind} over tokens"
    if kind == "dr_grpo" and (is_legacy or t.value(f"{ACTOR}loss_scale_factor")):
        what = "the micro batch" if is_legacy else "its loss_scale_factor"
        return kind, f"verl's gradient is larger by a constant factor, from {what}: only max_grad_norm feels it"
    return kind, ""


def _correction(t: Translation) -> None:
    level, cap, old = f"{CORRECTION}rollout_is", f"{CORRECTION}rollout_is_threshold", f"{ACTOR}tis_imp_ratio_cap"
    kind, limit = t.value(level), t.value(cap)
    if positive(t, old):
        level, kind, limit = old, "token", t.value(old)
    if kind not in ("token", "sequence"):
        t.converted(level, {"grpo.vllm_importance_sampling_correction": False}, "off, where TRL's default is on")
        return
    low, _, high = str(limit).rpartition("_")
    prefix = "grpo.vllm_importance_sampling_"
    values = {f"{prefix}clip_max": float(high), **({f"{prefix}clip_min": float(low)} if low else {})}
    t.converted(level, {f"{prefix}mode": f"{kind}_{'mask' if low else 'truncate'}", **values}, "")
    unused(t, [cap], f"{level} says it")


def _engine(t: Translation, is_lora: bool) -> None:
    shared.engine(t, KEYS)
    name, sleep, repetition = t.value(f"{ROLLOUT}name"), f"{ROLLOUT}free_cache_engine", f"{ROLLOUT}repetition_penalty"
    if t.version in LOOPS:
        unused(t, [repetition], "verl's agent loop samples with 1, whatever it says")
    else:
        shared.renamed(t, {repetition: "grpo.repetition_penalty"})
    t.speed(f"{ROLLOUT}name", f"vLLM generates here{'' if name == 'vllm' else f', not {name}'}")
    level = {"vllm.enable_sleep_mode": True, "vllm.sleep_level": 1 if is_lora else 2} if on(t.value(sleep)) else {}
    note = "its memory is the trainer's while weights are trained" if level else "it keeps its memory"
    t.speed(sleep, note, level)
    prefix, names = f"{ROLLOUT}engine_kwargs.vllm.", NAMES - ENGINE_FIXED.keys()
    engine = {rest: value for rest, value in shared.below(t, prefix).items() if value is not None}
    shared.renamed(t, {f"{prefix}{rest}": f"vllm.{rest}" for rest in engine if rest.partition(".")[0] in names})
    if on(engine.get("disable_mm_preprocessor_cache")):
        t.speed(f"{prefix}disable_mm_preprocessor_cache", "its name today", {"vllm.mm_processor_cache_gb": 0})
    for prefix, target in KWARGS.items():
        shared.renamed(t, {prefix + rest: f"{target}.{rest}" for rest in shared.below(t, prefix)})


def _without_engine(t: Translation) -> None:
    t.values = {path: value for path, value in t.values.items() if not path.startswith("vllm.")}
    for key in [key for key, row in t.rows.items() if any(path.startswith("vllm.") for path in row.to)]:
        del t.rows[key]
        unused(t, [key], "of an engine, and transformers generates")
    t.converted(f"{ROLLOUT}name", {"grpo.use_vllm": False}, "transformers generates")


def _data(t: Translation) -> None:
    shared.prompts(t, KEYS)
    columns = shared.columns(t, {"prompt": "prompt_key", "images": "image_key", "data_source": "reward_fn_key"})
    shared.files(t, KEYS, {"columns": {"ground_truth": "reward_model.ground_truth", **columns}})
    validation = f"{ROLLOUT}val_kwargs."
    sampling = {name: (validation + name, t.value(validation + name)) for name in ("temperature", "top_p")}
    sampling["top_k"] = (f"{validation}top_k", positive(t, f"{validation}top_k"))
    if t.version in LOOPS:
        sampling = sampling if positive(t, f"{validation}temperature") else {"temperature": sampling["temperature"]}
    elif not on(t.value(f"{validation}do_sample")):
        sampling = {"temperature": (f"{validation}do_sample", 0)}
    shared.evaluation(t, KEYS, sampling, f"{validation}n")
    drawn = "subsample" if on(t.value("data.shuffle")) else "max_samples"
    for key, target in (("data.train_max_samples", drawn), ("data.val_max_samples", "max_eval_samples")):
        if positive(t, key):
            t.same(key, f"data.{target}")
        unused(t, [key], "all rows")
    if _is_filtering(t):
        _filter(t)
    unused(t, [f"{FILTER}enable"], "no group is drawn again")


def _filter(t: Translation) -> None:
    fetched, is_recipe = "data.gen_batch_size", t.version != "2026.8"  # since then, a group alone is drawn again
    tries = int(positive(t, f"{FILTER}max_num_gen_batches")) if is_recipe else 0
    note = f"verl compares {t.value(f'{FILTER}metric')}, here it is the whole reward"
    shared.redraw(t, f"{FILTER}enable", tries, fetched, note)
    assert t.batch is not None
    if is_recipe and positive(t, fetched) > t.batch.prompts and not positive(t, KEYS.steps):
        most = f"{t.batch.prompts} of {t.number(fetched)}"
        t.changes(fetched, {}, f"verl trains on {most} prompts at most: its epochs have fewer rollouts than those here")


def _rewards(t: Translation) -> None:
    place = next((key for key in FUNCTIONS if t.value(f"{key}path")), None)
    if place:
        function = str(t.value(f"{place}name") or "compute_score")
        arguments = shared.below(t, f"{place}reward_kwargs.")
        items = [shared.reward(t, "verl", f"{place}path", str(t.value(f"{place}path")), function, arguments)]
        unused(t, [f"{place}name", *(f"{place}reward_kwargs.{name}" for name in arguments)], "in the adapter")
    else:
        items = [{"name": "grpo_autotune.interop.adapters.formulas:verl_by_data_source"}]
        note = "verl's own rewards by a row's data_source: here are those of gsm8k and geometry3k"
        t.changes("data.reward_fn_key", {"rewards": list(items)}, note)
    for key in filter(t.given, MANAGERS):
        is_plain = t.value(key) in ("naive", "dapo", "batch", "prime", None)
        (t.inert if is_plain else t.dropped)(key, "how the function is called")
    for buffer in BUFFERS:
        if on(t.value(f"{buffer}enable")) and positive(t, f"{buffer}len"):
            limit = f"{buffer.rpartition('overlong_buffer')[0]}max_resp_len"
            longest = shared.count(t, limit if t.value(limit) is not None else KEYS.longest_completion)
            factor = float(t.number(f"{buffer}penalty_factor") or 0)
            items.append(overlong_penalty(longest, int(t.number(f"{buffer}len")), factor))
            t.converted(f"{buffer}enable", {"rewards": items}, "a reward of its own, added to the others")
            unused(t, [f"{buffer}len", f"{buffer}penalty_factor", limit], f"of {buffer}enable")
    t.set("rewards", items)
