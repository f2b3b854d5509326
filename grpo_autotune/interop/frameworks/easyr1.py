"""EasyR1: YAML with overrides of OmegaConf, and the `experiment_config.json` that a run leaves.

Versions: 2025.2 (names of their own, up to April), 2025.6 (each micro batch's loss is a mean of its own, up to July),
2026.7. Defaults are those of its classes at 6241a21, 3d1fc8f and b44b311.
"""

from typing import Any

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import rollout_trainers as shared
from grpo_autotune.interop.frameworks.rollout_trainers import on, positive, refuse, unused
from grpo_autotune.interop.frameworks.rollout_words import Keys, keys_of, spelled
from grpo_autotune.interop.reading.files import beside
from grpo_autotune.interop.source import Source
from grpo_autotune.interop.translation import Translation

ACTOR, ROLLOUT = "worker.actor.", "worker.rollout."
MODEL, OPTIM, LORA = f"{ACTOR}model.", f"{ACTOR}optim.", f"{ACTOR}model.lora."
VALIDATION = f"{ROLLOUT}val_override_config."
AVERAGE, LOSS, MICRO = f"{ACTOR}loss_avg_mode", f"{ACTOR}loss_type", f"{ACTOR}micro_batch_size_per_device_for_update"

KEYS = keys_of("easyr1")
DEFAULTS: dict[str, Any] = spelled("easyr1", {
    "data.max_prompt_length": 512, "data.max_response_length": 512, "data.rollout_batch_size": 512,
    "data.filter_overlong_prompts": True, "data.truncation": "error", "data.shuffle": True, "data.seed": 1,
    "data.min_pixels": 262144, "data.max_pixels": 4194304, "data.prompt_key": "prompt", "data.answer_key": "answer",
    "data.image_key": "images", "algorithm.adv_estimator": "grpo", "algorithm.disable_kl": False,
    "algorithm.use_kl_loss": False, "algorithm.kl_penalty": "kl", "algorithm.kl_coef": 0.001,
    "algorithm.filter_key": "overall", "algorithm.filter_low": 0.01, "algorithm.filter_high": 0.99,
    "actor.global_batch_size": 256, "actor.micro_batch_size_per_device_for_update": 4, "actor.max_grad_norm": 1.0,
    "actor.clip_ratio_low": 0.2, "actor.clip_ratio_high": 0.3, "actor.clip_ratio_dual": 3.0,
    "actor.loss_avg_mode": "token", "actor.loss_type": "default", "actor.ppo_epochs": 1,
    "model.enable_gradient_checkpointing": True, "model.trust_remote_code": True, "model.lora.rank": 0,
    "model.lora.alpha": 64, "model.lora.target_modules": "all-linear", "optim.lr": 1e-6, "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.01, "optim.strategy": "adamw", "optim.lr_warmup_ratio": 0.0,
    "optim.lr_scheduler_type": "constant", "rollout.n": 1, "rollout.temperature": 1.0, "rollout.top_p": 1.0,
    "rollout.top_k": -1, "rollout.gpu_memory_utilization": 0.6, "rollout.tensor_parallel_size": 2,
    "rollout.val_override_config.n": 1, "trainer.total_epochs": 15, "trainer.logger": ["console", "wandb"],
    "trainer.nnodes": 1, "trainer.n_gpus_per_node": 8, "trainer.max_try_make_batch": 20, "trainer.val_freq": -1,
    "trainer.val_before_train": True, "trainer.save_freq": -1, "trainer.save_limit": -1,
})  # fmt: skip
KL = ("algorithm.use_kl_loss", "algorithm.kl_coef", "algorithm.kl_penalty")
OLD_KL = (f"{ACTOR}use_kl_loss", f"{ACTOR}kl_loss_coef", f"{ACTOR}kl_loss_type")
OLD_KEYS = {"epochs": "trainer.total_episodes", "val": "trainer.test_freq", "low": f"{ACTOR}clip_ratio",
            "high": f"{ACTOR}clip_ratio", "warmup_ratio": f"{OPTIM}lr_warmup_steps_ratio",
            "schedule": f"{OPTIM}warmup_style"}  # fmt: skip
EARLY: dict[str, Any] = {  # defaults of 02/2025 that differ, under its names
    "algorithm.adv_estimator": "gae", **dict(zip(OLD_KL, (True, 1e-3, "low_var_kl"), strict=True)),
    **dict(zip(OLD_KEYS.values(), (10, -1, 0.2, 0.2, 0.0, "constant"), strict=True)), f"{ACTOR}clip_ratio_dual": None,
    f"{ROLLOUT}gpu_memory_utilization": 0.5, MICRO: None, "data.filter_overlong_prompts": False,
}  # fmt: skip
FIRST = {f"{ACTOR}entropy_coeff": 1e-3, f"{VALIDATION}temperature": 0}  # up to 18 March, when val_override_config came
EARLY_MARKS = (*OLD_KL, "trainer.total_episodes", "trainer.test_freq", "worker.reward.compute_score")
DYNAMIC, SCORED = f"{ACTOR}dynamic_batching", "worker.reward.reward_type"  # since 14 July 2025, and up to November
VERSIONS = ("2025.2", "2025.6", "2026.7")


def translate(source: Source, version: str | None = None, world_size: int | None = None) -> Translation:
    """The file's settings with EasyR1's defaults, each with its verdict. ConfigError for what TRL cannot train."""
    t = _resolved(source, version, world_size)
    is_early, given = t.version == "2025.2", t.source.settings
    old = [name for name in OLD_KEYS if OLD_KEYS[name] in given or (is_early and getattr(KEYS, name) not in given)]
    keys = KEYS._replace(**{name: OLD_KEYS[name] for name in old})
    _batch(t, keys)
    _loss(t, keys)
    _kl(t, is_early and not any(map(t.given, ("algorithm.use_kl_loss", "algorithm.disable_kl"))))
    _weights(t, keys)
    shared.engine(t, keys)
    t.set("grpo.vllm_importance_sampling_correction", False, "EasyR1 has none; TRL's is on, and costs a pass")
    t.set("vllm.enable_sleep_mode", True, "EasyR1's engine always sleeps while weights are trained")
    t.set("vllm.sleep_level", 1)
    if positive(t, f"{ROLLOUT}limit_images"):
        t.same(f"{ROLLOUT}limit_images", "vllm.limit_mm_per_prompt.image")
    _data(t, keys)
    _reward(t)
    shared.cadence(t, keys, ends_early=is_early)
    shared.naming(t, keys)
    shared.by_name(t)
    shared.explain(t)
    return t


def _resolved(source: Source, version: str | None, world_size: int | None) -> Translation:
    if version not in (None, *VERSIONS):
        what = f"{version!r} is no version of EasyR1"
        raise ConfigError(what, where="--source-version", fix=f"Known: {', '.join(VERSIONS)}.")
    mark = next((key for key in EARLY_MARKS if key in source.settings), None)
    name, reason = ("2025.2", f"it has the key {mark}") if mark else ("2026.7", "assumed, as no key tells")
    if mark is None and SCORED in source.settings and DYNAMIC not in source.settings:
        name, reason = "2025.6", f"it has the key {SCORED}, and no {DYNAMIC}"
    name, reason = (version, "--source-version") if version else (name, reason)
    first = {} if any(key.startswith(VALIDATION) for key in source.settings) else FIRST
    return Translation(source, DEFAULTS | (EARLY | first if name == "2025.2" else {}), name, reason, world_size)


def _batch(t: Translation, keys: Keys) -> None:
    estimator = "algorithm.adv_estimator"
    if t.value(estimator) != "grpo":
        refuse(t, estimator, f"advantages by {t.value(estimator)} are not GRPO's", "Only grpo can be read.")
    t.same(estimator, "grpo.scale_rewards", "group", shared.EPSILON)
    if not positive(t, MICRO):
        refuse(t, MICRO, "no size of a micro batch, which EasyR1 needs as well")
    sizes = (f"{ACTOR}ulysses_size", f"{ACTOR}ulysses_sequence_parallel_size")
    ranks = shared.devices(t, keys, [key for key in sizes if t.given(key)])
    shared.batch(t, keys, int(t.number(MICRO)), ranks, [MICRO])


def _weights(t: Translation, keys: Keys) -> None:
    modules = t.value(keys.adapted)
    if isinstance(modules, str) and modules != "all-linear":
        modules = [name.strip() for name in modules.split(",")]
    shared.weights(t, f"{ACTOR}fsdp.torch_dtype", shared.lora(t, keys, modules))
    shared.schedule(t, keys)
    shared.betas(t, f"{OPTIM}betas")
    if t.value(f"{OPTIM}strategy") == "adamw":
        t.inert(f"{OPTIM}strategy", "TRL's as well")
    else:
        note = "EasyR1 corrects the rounding of bfloat16 weights and states (Kahan); TRL's AdamW loses small updates"
        t.changes(f"{OPTIM}strategy", {}, note)


def _loss(t: Translation, keys: Keys) -> None:
    """Form and averaging of the loss; EasyR1 weighs each micro batch by its tokens."""
    kind, average = str(t.value(LOSS)), str(t.value(AVERAGE))
    if kind not in ("default", "gspo", "gspo_token", "cispo", "sapo") or average not in ("token", "seq"):
        refuse(t, LOSS, f"TRL has no loss like {kind} with the average by {average}")
    shared.clipping(t, keys, kind if kind in ("cispo", "sapo") else "clip", t.version != "2025.2")
    assert t.batch is not None
    form, note = {"token": "dapo", "seq": "grpo"}[average], ""
    if kind in ("cispo", "sapo"):
        form = kind
        if (kind == "cispo") != (average == "token"):
            note = f"TRL averages {kind} over {'tokens' if kind == 'cispo' else 'sequences'}"
    if average == "seq":
        note = "EasyR1 weighs the mean over a micro batch's sequences by its tokens: of one, that is by token"
    elif kind == "default" and t.version != "2026.7":
        form, micro = "bnpo", t.values["grpo.per_device_train_batch_size"]
        if micro != t.batch.micro_batch:
            note = f"the mean over the tokens of a micro batch: of {t.batch.micro_batch} completions, here of {micro}"
    elif kind != "sapo":
        note = shared.uneven(t)
    if kind == "sapo":
        signs = (("positive", "pos"), ("negative", "neg"))
        shared.renamed(t, {f"{ACTOR}tau_{sign}": f"grpo.sapo_temperature_{ours}" for sign, ours in signs})
    level = {"grpo.importance_sampling_level": "sequence"} if kind.startswith("gspo") else {}
    t.converted(LOSS, {"grpo.loss_type": form, **level})
    t.verdict("changes" if note else "same", AVERAGE, {"grpo.loss_type": form}, note)


def _kl(t: Translation, is_early: bool) -> None:
    keys, reward = OLD_KL if is_early else KL, "algorithm.kl_coef"
    if on(t.value("algorithm.disable_kl")):
        t.converted("algorithm.disable_kl", {"grpo.beta": 0.0}, "no reference model")
        unused(t, keys, "without effect, as algorithm.disable_kl is on")
    elif not on(t.value(keys[0])) and t.number(reward):
        t.dropped(keys[0], f"KL in the reward, weight {t.number(reward):g}: TRL has it in the loss alone (grpo.beta)")
    else:
        shared.kl(t, *keys)


def _data(t: Translation, keys: Keys) -> None:
    shared.prompts(t, keys)
    template = _template(t, "data.format_prompt", "data.prompt_template", "its `content` is the column of the prompt")
    _template(t, "data.override_chat_template", "model.chat_template", "")
    names = {"content" if template else "prompt": "prompt_key", "images": "image_key", "ground_truth": "answer_key"}
    columns = {**shared.columns(t, names), "ground_truth": str(t.value("data.answer_key"))}
    shared.files(t, keys, {"columns": columns, **({"prompt_template": template} if template else {})})
    if template and "data.mix" in t.values:
        t.values.pop("data.prompt_template")
    sampling = {name: (VALIDATION + name, t.value(VALIDATION + name)) for name in ("temperature", "top_p")}
    if t.value(f"{VALIDATION}top_k") is not None:
        sampling["top_k"] = (f"{VALIDATION}top_k", positive(t, f"{VALIDATION}top_k"))
    shared.evaluation(t, keys, sampling, f"{VALIDATION}n")
    if on(t.value("algorithm.online_filtering")):
        low, high = (t.number(f"algorithm.filter_{end}") for end in ("low", "high"))
        tries, name = int(positive(t, "trainer.max_try_make_batch")), t.value("algorithm.filter_key")
        note = f"EasyR1 keeps groups with a mean of {name} from {low:g} to {high:g}; here those whose rewards differ"
        shared.redraw(t, "algorithm.online_filtering", tries, "data.mini_rollout_batch_size", note)


def _template(t: Translation, key: str, target: str, note: str) -> str | None:
    named = t.value(key)
    file = beside(t.source.path, str(named)) if on(named) else None
    if file is not None:
        t.same(key, target, str(file), note)
        return str(file)
    if on(named):
        t.dropped(key, f"{named} is not here: put its text into {target}; until then it is left out")
    unused(t, [key], "not set")
    return None


def _reward(t: Translation) -> None:
    key, arguments = "worker.reward.reward_function", shared.below(t, "worker.reward.reward_function_kwargs.")
    if not on(t.value(key)) and t.given("worker.reward.compute_score"):
        note = "EasyR1's own: 0.9 for the right answer, by mathruler, and 0.1 for the form; here 1, by math-verify"
        reward = {"name": "accuracy_reward", "params": {"column": "ground_truth"}}
        t.changes("worker.reward.compute_score", {"rewards": [reward]}, note)
        return
    if not on(t.value(key)):
        refuse(t, key, "no file of a reward function", "Name it there as FILE:FUNCTION.")
    named = str(t.value(key))
    path, _, function = named.rpartition(":") if ":" in named else (named, "", "main")
    style = "easyr1_each" if t.value(SCORED) == "sequential" else "easyr1"  # later a constant of the function's file
    shared.reward(t, style, key, path, function, arguments)
    unused(t, [SCORED, *(f"worker.reward.reward_function_kwargs.{name}" for name in arguments)], "in the adapter")
