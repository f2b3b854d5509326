"""The model, the data, the rewards, the loss and the engine of ms-swift's GRPO in the keys of a `RunConfig`."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from grpo_autotune.config.sections.vllm import VllmSection, engine_names
from grpo_autotune.interop.frameworks import swift_keys
from grpo_autotune.interop.reading.beside import beside, text_of
from grpo_autotune.interop.translation import Translation

LOSSES = {"grpo": "", "bnpo": "", "dr_grpo": "", "sapo": "", "dapo": "total", "cispo": "total"}
"""Losses that TRL has by the same formula. Those over a rollout's `total` tokens are a factor smaller there."""
SCHEDULES = {"inverse-square-root": "inverse_sqrt", "WSD": "constant_with_warmup"}
KERNELS = {"flash_attn": "flash_attention_2"}
COLUMNS = {"query": "prompt", "question": "prompt", "messages": "prompt"}
PIXELS = {"MAX_PIXELS": ("max", 1), "MIN_PIXELS": ("min", 1), "IMAGE_MAX_TOKEN_NUM": ("max", 1024), "IMAGE_MIN_TOKEN_NUM": ("min", 1024)}  # fmt: skip
"""Variable -> the limit, and pixels of its unit (a token of Qwen3-VL is 32 x 32)."""
FORMAT = r"^<think>.*?</think>\s*<answer>.*?</answer>\Z"
SWIFT_REWARDS = ("toolbench", "math", "react_format")
"""Rewards of ms-swift (swift/rewards/orm.py) that nothing here is like."""


def translate(to: Translation, megatron: bool, version: str) -> None:
    """Verdicts of all settings but the batch and how GPUs share the work, which come before and after."""
    _model(to, megatron)
    _adapter(to)
    _data(to)
    _images(to)
    _rewards(to)
    _loss(to)
    _engine(to, megatron)
    _schedule(to)
    _evaluation(to)
    for key, target in swift_keys.SAME.items():
        if key not in to.rows and to.value(key) is not None:
            to.same(key, target)


def words(value: Any) -> list[Any]:
    """Several words of a command line, of which one is no list."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value in (None, "") else [value]


def mapping(value: Any) -> dict[str, Any]:
    """A mapping that may be JSON text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _model(to: Translation, megatron: bool) -> None:
    name = str(to.value("model", ""))
    hub = to.value("use_hf") is True or str(to.value("USE_HF")) in ("1", "true", "True")
    elsewhere = (
        ""
        if hub or "/" not in name or beside(to.source.path, name)
        else "a ModelScope id: see that the Hugging Face hub has the same"
    )
    to.same("model", "model.name_or_path", name, elsewhere, "" if sees(to) else "taken for a text model")
    for key in ("use_hf", "USE_HF"):
        to.inert(key, "the Hugging Face hub is used") if to.given(key) else None
    dtype = to.value("torch_dtype")
    if dtype is not None:
        to.same("torch_dtype", "model.dtype", dtype)
    half = to.value("fp16") if to.given("fp16") else dtype in ("float16", "float32")
    brain = to.value("bf16") if to.given("bf16") else not half
    for key, value in (("fp16", half), ("bf16", brain)):
        to.verdict("same", key, {f"grpo.{key}": bool(value)}) if to.given(key) or (half and dtype) else None
    if to.given("attn_impl"):
        to.same("attn_impl", "model.attn_implementation", KERNELS.get(to.value("attn_impl"), to.value("attn_impl")))
    if to.given("recompute_granularity"):
        to.speed(
            "recompute_granularity",
            "Megatron's",
            {"grpo.gradient_checkpointing": to.value("recompute_granularity") != "none"},
        )
    if sees(to):
        note = "by the model's name, it sees images; a tower that is frozen gets no adapters either"
        to.same("freeze_vit", "model.freeze_vision_tower", bool(to.value("freeze_vit")), note)
    elif to.given("freeze_vit"):
        to.inert("freeze_vit", "taken for a text model")
    if to.given("freeze_aligner"):
        frozen = bool(to.value("freeze_aligner")) == bool(to.value("freeze_vit"))
        to.inert("freeze_aligner", "goes with the tower of Qwen models") if frozen else to.dropped(
            "freeze_aligner", "it goes with the tower"
        )


def sees(to: Translation) -> bool:
    """True for a model that sees images: by the config.json of a folder, else by its name, or where the file limits images."""
    name = str(to.value("model", ""))
    config = Path(name).expanduser() / "config.json"
    if config.is_file():
        return "vision_config" in config.read_text(encoding="utf-8", errors="replace")
    return bool(re.search(swift_keys.VISION, name)) or any(to.given(key) for key in PIXELS)


def _adapter(to: Translation) -> None:
    kind = to.value("tuner_type")
    keys = [key for key in swift_keys.PEFT if to.given(key)]
    if kind == "full" and not to.given("adapters"):
        to.inert("tuner_type", "no adapter")
        for key in keys:
            to.inert(key, "without an adapter")
        return
    if kind in ("lora", "full", "lora_llm"):
        to.verdict("converted", "tuner_type", {}, "a peft section")
    else:
        to.changes("tuner_type", {}, f"{kind} is not read: LoRA takes its place")
    for key in dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "target_modules", *keys)):
        value = to.value(key)
        if key == "target_modules":
            value = words(value)
            value = "all-linear" if "all-linear" in value else value[0] if to.given("target_regex") else value
        to.same(
            key,
            f"peft.{swift_keys.PEFT[key]}",
            words(value) if key in ("modules_to_save", "target_parameters") else value,
        )
    if to.given("init_weights"):
        to.same(
            "init_weights",
            "peft.init_lora_weights",
            {"true": True, "false": False}.get(str(to.value("init_weights")).lower(), to.value("init_weights")),
        )
    _four_bits(to)


def _four_bits(to: Translation) -> None:
    bits = to.value("quant_bits")
    if to.value("quant_method", "bnb") == "bnb" and bits == 4:
        to.same("quant_bits", "model.load_in_4bit", True)
        to.inert("quant_method", "bitsandbytes") if to.given("quant_method") else None
    for key, ours in (("bnb_4bit_quant_type", "nf4"), ("bnb_4bit_use_double_quant", True)):
        if to.given(key):
            to.inert(key, "as here") if to.value(key) == ours else to.changes(key, {}, f"{ours} here")


def _data(to: Translation) -> None:
    """The data sets, several as parts of a mixture, and the keys that each part has of its own."""
    parts = [part for text in words(to.value("dataset")) for part in _subsets(str(text))]
    names = [_part_name(part, number) for number, part in enumerate(parts)] if len(parts) > 1 else []
    amount = "subsample" if to.value("dataset_shuffle") else "max_samples"
    entries = [
        {
            **{key: part[key] for key in ("path", "name") if part[key]},
            **({amount: part["rows"]} if part["rows"] else {}),
        }
        for part in parts
    ]
    if names:
        places = [f"data.mix.{name}." for name in names]
        targets = {"data.path": "mixture"} | {
            place + key: value for place, entry in zip(places, entries) for key, value in entry.items()
        }
    else:
        places, targets = ["data."], {f"data.{key}": value for entry in entries for key, value in entry.items()}
    hints = ["swift draws the rows at random" if any(part["rows"] for part in parts) else "", *_hub(to, parts)]
    to.converted("dataset", targets, "; ".join(hint for hint in hints if hint), "prompts: see data.columns")

    def everywhere(key: str, value: Any) -> dict[str, Any]:
        return {place + key: value for place in places}

    if (columns := _columns(to)) and to.given("columns"):
        to.converted("columns", everywhere("columns", columns), "swift writes theirs: ours; here it is ours: theirs")
    elif not to.given("columns"):
        to.warnings.append(
            "swift looks for the prompt in the columns messages, query, question, problem and others: data.columns must "
            "name it where it is not prompt"
        )
    if to.given("system"):
        _system(to, everywhere)
    held = [part for text in words(to.value("val_dataset")) for part in _subsets(str(text))]
    if held:
        to.converted(
            "val_dataset",
            everywhere("eval_path", held[0]["path"]),
            f"{held[0]['rows']} rows of it" if held[0]["rows"] else "",
        )
        if held[0]["rows"]:
            to.set("data.max_eval_samples", held[0]["rows"])
    elif to.value("split_dataset_ratio"):
        to.same("split_dataset_ratio", f"{places[0]}split_ratio")
    if to.value("max_length"):
        overflow = {"left": "left", "delete": "filter"}.get(to.value("truncation_strategy"), "filter")
        to.same("max_length", "data.max_prompt_tokens", note="of the prompt alone, in GRPO")
        note = (
            "swift draws another row instead"
            if overflow == "filter"
            else "a prompt with an image is not cut here, but stops the run"
        )
        to.converted("truncation_strategy", {"data.prompt_overflow": overflow}, note)
    elif to.given("truncation_strategy"):
        to.inert("truncation_strategy", "no max_length: the model's own")
    if to.value("enable_thinking") is not None:
        to.same("enable_thinking", "grpo.chat_template_kwargs", {"enable_thinking": to.value("enable_thinking")})


def _subsets(text: str) -> Iterator[dict[str, Any]]:
    """The parts of `HF::path:subset/subset#rows` (swift/dataset/dataset_syntax.py)."""
    text = re.sub(r"^(?i:hf|ms)::", "", text)
    text, _, rows = text.rpartition("#") if re.search(r"#\d+$", text) else (text, "", "")
    path, _, subsets = text.partition(":")
    for subset in subsets.split("/") if subsets else [""]:
        yield {"path": path.strip(), "name": subset.strip(), "rows": int(rows) if rows else None}


def _part_name(part: Mapping[str, Any], number: int) -> str:
    stem = PurePosixPath(part["path"]).name.partition(".")[0]
    return re.sub(r"\W", "_", f"{stem}_{part['name']}" if part["name"] else stem) + f"_{number + 1}"


def _hub(to: Translation, parts: list[dict[str, Any]]) -> list[str]:
    files = all(
        re.search(r"\.(jsonl?|csv|parquet)$", part["path"]) or part["path"].startswith((".", "/")) for part in parts
    )
    given = to.value("use_hf") is True or str(to.value("USE_HF")) in ("1", "true", "True")
    return [] if files or given else ["a ModelScope id: see that the Hugging Face hub has the same"]


def _columns(to: Translation) -> dict[str, str]:
    """Our column -> the data's, of swift's mapping in the other direction."""
    given = mapping(to.value("columns"))
    for key in [key for key in to.source.settings if key.startswith("columns.")]:
        given[key.partition(".")[2]] = to.value(key)
        to.converted(key, {}, "in data.columns")
    return {COLUMNS.get(swifts, swifts): str(theirs) for theirs, swifts in given.items()}


def _system(to: Translation, everywhere: Callable[[str, Any], dict[str, Any]]) -> None:
    """A system prompt, as text or as the name of a file."""
    text = str(to.value("system"))
    path = beside(to.source.path, text) if text.endswith(".txt") else None
    if path is not None:
        to.same("system", "data.system_prompt", text_of(path), f"the text of {path.name}")
        to.converted("system", everywhere("system_prompt", text_of(path)), f"the text of {path.name}")
    elif text.endswith(".txt"):
        to.dropped("system", "the file is not at hand: write its text into data.system_prompt")
    else:
        to.converted("system", everywhere("system_prompt", text.replace("\\n", "\n")), "")


def _images(to: Translation) -> None:
    for key, (end, unit) in PIXELS.items():
        if to.given(key):
            target = {f"data.{end}_pixels": to.number(key) * unit}
            to.converted(key, target, "the processor rounds sides to whole patches, there as here")
    if to.value("max_pixels"):
        to.same("max_pixels", "data.max_pixels")
    for key in ("FPS", "FPS_MAX_FRAMES", "VIDEO_MAX_PIXELS", "VIDEO_MAX_TOKEN_NUM", "SPATIAL_MERGE_SIZE"):
        to.inert(key, "of videos" if key != "SPATIAL_MERGE_SIZE" else "the processor's own") if to.given(key) else None


def _rewards(to: Translation) -> None:
    """Rewards by name, swift's and those of the user's plugin."""
    names, weights = [str(name) for name in words(to.value("reward_funcs"))], words(to.value("reward_weights"))
    plugins = [str(name) for name in words(to.value("external_plugins"))]
    items, notes = [], []
    for name in names:
        item, note = _reward(to, name)
        items.append(item | ({"weight": float(weights[len(items)])} if len(weights) == len(names) else {}))
        notes.append(f"{name}: {note}")
    if not items:
        to.set("rewards", [{"name": "swift_rewards:reward"}], "the file names none: write one")
        to.warnings.append("the file names no reward: rewards must name one before training")
        return
    to.changes("reward_funcs", {"rewards": items}, "; ".join(notes))
    if weights:
        to.converted("reward_weights", {}, "in rewards[].weight")
    if plugins:
        to.converted("external_plugins", {}, f"rewards of swift_rewards.py call {', '.join(plugins)}")
    for key in [key for key in to.source.settings if re.match(r"(cosine|repetition|soft)_", key)]:
        to.converted(key, {}, "in rewards[].params")


def _reward(to: Translation, name: str) -> tuple[dict[str, Any], str]:
    """The item of a reward, and how far it is the same."""
    longest = to.value("max_completion_length")
    cosine = {f"{ours}_{case}": to.value(f"cosine_{theirs}_len_value_{case}") for ours, theirs, case in (
        ("min_value", "min", "wrong"), ("max_value", "max", "wrong"), ("min_value", "max", "correct"), ("max_value", "min", "correct"))}  # fmt: skip
    known: dict[str, tuple[str, dict[str, Any], str]] = {
        "accuracy": ("accuracy_reward", {}, "swift reads inside <answer> first, and gives 0 where it cannot read the solution; here such a row has no reward"),
        "format": ("regex", {"pattern": FORMAT}, "the same"),
        "cosine": ("cosine_scaled_reward", {"max_len": to.value("cosine_max_len") or longest, **cosine}, "as accuracy"),
        "repetition": ("repetition_penalty_reward", {"ngram_size": to.value("repetition_n_grams"), "max_penalty": to.value("repetition_max_penalty")}, "n-grams of tokens, not of words"),
        "soft_overlong": ("soft_overlong_punishment", {"max_completion_len": to.value("soft_max_length") or longest, "soft_punish_cache": to.value("soft_cache_length")}, "the same"),
    }  # fmt: skip
    if name not in known:
        return {
            "name": f"swift_rewards:{name}"
        }, "of swift, which must be installed" if name in SWIFT_REWARDS else "the plugin's"
    ours, params, note = known[name]
    return {"name": ours} | ({"params": params} if params else {}), note


def _loss(to: Translation) -> None:
    kind, beta = to.value("loss_type"), to.value("beta") or 0
    to.same("beta", "grpo.beta", beta, "k3, as in TRL")
    if beta:
        to.set("grpo.use_bias_correction_kl", False, "swift does not multiply the KL term by the ratio")
    to.same("loss_type", "grpo.loss_type", kind)
    six = to.batch
    factor = six.rollout / (six.ranks * six.micro_batch) if six is not None and LOSSES[kind] else 1
    if factor != 1:
        _same_clip(to, kind, factor)
    level = str(to.value("importance_sampling_level"))
    if level == "sequence_token":
        note = "the same gradient, since all tokens of a completion have one advantage (arXiv 2507.18071, section 4.3)"
        to.converted("importance_sampling_level", {"grpo.importance_sampling_level": "sequence"}, note)
    scale = {True: "group", False: "none", None: "group"}.get(to.value("scale_rewards"), to.value("scale_rewards"))
    if scale == "gdpo":
        to.converted(
            "scale_rewards", {"grpo.multi_objective_aggregation": "normalize_then_sum"}, "eps 1e-8 there, 1e-4 here"
        )
    else:
        to.same("scale_rewards", "grpo.scale_rewards", scale)
    to.same("top_k", "grpo.top_k", max(0, to.value("top_k")), "-1 and 0 take every token")
    if to.value("min_p"):
        to.same("min_p", "grpo.min_p")
    if to.value("dynamic_sample"):
        _resample(to)
    if (quantile := to.value("top_entropy_quantile", 1.0)) < 1:
        note = "the threshold is that of a rank's micro batch there, of all ranks' micro batches here"
        to.changes("top_entropy_quantile", {"grpo.top_entropy_quantile": quantile}, note)
    if to.value("overlong_filter") and LOSSES[kind]:
        to.changes(
            "overlong_filter",
            {"grpo.mask_truncated_completions": True},
            "tokens that are left out still divide the loss there, and not here",
        )
    if stop := words(to.value("stop_words")):
        _stop(to, stop)


def _same_clip(to: Translation, kind: str, factor: float) -> None:
    """A loss that is divided by the tokens of a rollout and again by the accumulation is smaller than TRL's by the micro
    steps of a rollout. AdamW does not feel it but in its epsilon; clipping does."""
    note = f"the gradient of {kind} is {factor:g} times smaller there ({factor:g} micro steps per rollout): the same clipping and AdamW"
    clip, epsilon = to.value("max_grad_norm") or 0, to.value("adam_epsilon") or 1e-8
    to.converted("max_grad_norm", {"grpo.max_grad_norm": clip * factor}, note, note)
    to.converted("adam_epsilon", {"grpo.adam_epsilon": epsilon * factor}, note, "as max_grad_norm")


def _resample(to: Translation) -> None:
    rounds = to.number("max_resample_times")
    if rounds < 2:
        to.inert("dynamic_sample", "max_resample_times 1 draws a batch that is never used")
        return
    note = f"at most {rounds} generations there as here; where they do not suffice, swift trains on the first as it was"
    to.changes("dynamic_sample", {"resample.max_rounds": rounds}, note)
    to.converted(
        "max_resample_times", {}, "in resample.max_rounds: the last draw is never looked at there"
    ) if to.given("max_resample_times") else None


def _stop(to: Translation, stop: list[Any]) -> None:
    if to.value("use_vllm"):
        note = "a completion that ends so has no end token, and counts as truncated here"
        to.changes("stop_words", {"grpo.generation_kwargs": {"stop": stop}}, note)
    else:
        to.dropped("stop_words", "needs grpo.use_vllm")


def _engine(to: Translation, megatron: bool) -> None:
    """vLLM's keys: in the training process, or at a server."""
    given = [key for key in to.source.settings if key.startswith("vllm_")]
    uses = bool(to.value("use_vllm"))
    to.same("use_vllm", "grpo.use_vllm", uses)
    server = _at_server(to)
    if not uses:
        for key in [*given, "sleep_level"]:
            to.inert(key, "without vLLM") if to.given(key) else None
        return
    to.set("grpo.vllm_importance_sampling_correction", False, "off in swift; TRL's is on, and costs a pass")
    if mode := to.value("rollout_importance_sampling_mode"):
        _correction(to, str(mode))
    if server:
        note = "swift rollout speaks another protocol: start grpo-autotune serve, or set vllm.server_gpus"
        own = {"vllm.server_gpus": to.number("rollout.gpus")} if to.given("rollout.gpus") else {"vllm.mode": "server"}
        to.verdict("converted", "rollout.gpus" if to.given("rollout.gpus") else "vllm_mode", own, note)
    else:
        to.verdict("same", "vllm_mode", {"vllm.mode": "colocate"})
        ranks = math.gcd(int(to.value("vllm_tensor_parallel_size")), to.world_size or 1)
        to.speed("vllm_tensor_parallel_size", "of the processes there are", {"vllm.tensor_parallel_size": ranks})
        share = float(to.value("vllm_gpu_memory_utilization"))
        to.same("vllm_gpu_memory_utilization", "vllm.gpu_memory_utilization", share)
        if to.value("sleep_level"):
            to.same("sleep_level", "vllm.sleep_level")
    for key in [key for key in (*given, "sleep_level") if key not in to.rows and to.given(key)]:
        _engine_key(to, key, server)


def _at_server(to: Translation) -> bool:
    if to.given("rollout.gpus") and "rollout" not in str(to.value("colocate_groups")):
        return True
    return to.value("vllm_mode") == "server" or to.given("vllm_server_host") or to.given("vllm_server_base_url")


def _engine_key(to: Translation, key: str, server: bool) -> None:
    name, value = key.removeprefix("vllm_"), to.value(key)
    if name.startswith("server_"):
        name = {"server_group_port": "group_port"}.get(name, name)
        first = (words(value) or [None])[0]
        if name not in VllmSection.model_fields or not server or first is None or to.given("rollout.gpus"):
            to.inert(key, "no such server")
        else:
            to.same(key, f"vllm.{name}", first)
    elif server:
        to.inert(key, "the server has options of its own")
    elif key == "vllm_enable_lora":
        to.speed(key, "the adapter alone goes to the engine", {"vllm.weight_sync": "adapter"} if value else {})
    elif key == "vllm_engine_kwargs":
        inside = mapping(value)
        known = {f"vllm.{name}": part for name, part in inside.items() if name in engine_names()}
        unknown = [name for name in inside if name not in engine_names()]
        to.converted(key, known, f"not known here: {', '.join(unknown)}" if unknown else "")
    elif name in engine_names() and name not in ("max_lora_rank", "data_parallel_size", "disable_custom_all_reduce"):
        to.same(key, f"vllm.{name}", mapping(value) if name in ("limit_mm_per_prompt", "speculative_config") else value)
    else:
        to.speed(key, "chosen here by itself")


def _correction(to: Translation, mode: str) -> None:
    threshold = to.number("rollout_importance_sampling_threshold")
    targets = {
        "grpo.vllm_importance_sampling_correction": True, "grpo.vllm_importance_sampling_mode": mode,
        "grpo.vllm_importance_sampling_clip_max": threshold,
    }  # fmt: skip
    notes = (
        ["the ratio of a sequence is the geometric mean of its tokens' there, their product here"]
        if mode.startswith("sequence")
        else []
    )
    notes += ["the KL term is weighted, too, there"] if to.value("beta") else []
    to.verdict(
        "changes meaning" if notes else "converted", "rollout_importance_sampling_mode", targets, "; ".join(notes)
    )
    if to.given("rollout_importance_sampling_threshold"):
        to.converted("rollout_importance_sampling_threshold", {"grpo.vllm_importance_sampling_clip_max": threshold}, "")


def _schedule(to: Translation) -> None:
    rate = to.value("learning_rate")
    full = to.value("tuner_type") == "full"
    to.same(
        "learning_rate",
        "grpo.learning_rate",
        rate if rate is not None else 1e-5 if full else 1e-4,
        "" if rate else "swift's for full training" if full else "swift's for adapters",
    )
    if to.value("warmup_ratio"):
        to.converted(
            "warmup_ratio", {"grpo.warmup_steps": to.number("warmup_ratio")}, "below 1 it is a share of all steps"
        )
    elif to.given("warmup_ratio"):
        to.inert("warmup_ratio", "no warm-up")
    kind, least = str(to.value("lr_scheduler_type")), to.value("min_lr") or 0
    if kind in SCHEDULES:
        note = "" if kind != "WSD" else "without its decay at the end"
        to.verdict(
            "changes meaning" if note else "same",
            "lr_scheduler_type",
            {"grpo.lr_scheduler_type": SCHEDULES[kind]},
            note,
        )
    if least and kind in ("cosine", "linear"):
        flat = least == to.values["grpo.learning_rate"]
        targets = (
            {"grpo.lr_scheduler_type": "constant_with_warmup"}
            if flat
            else {"grpo.lr_scheduler_type": "cosine_with_min_lr", "grpo.lr_scheduler_kwargs": {"min_lr": least}}
        )
        to.converted("lr_scheduler_type", targets, f"down to min_lr {least:g}")
        to.converted("min_lr", targets, "the rate stays" if flat else "")
    if to.given("max_steps") and to.given("num_train_epochs"):
        to.inert("num_train_epochs", "max_steps wins")


def _evaluation(to: Translation) -> None:
    held = to.given("val_dataset") or bool(to.value("split_dataset_ratio"))
    strategy = to.value("eval_strategy") or to.value("save_strategy")
    keys = [
        key
        for key in to.source.settings
        if key.startswith(("eval_s", "eval_i", "per_device_eval", "num_generations_eval"))
    ]
    if not held or strategy == "no":
        for key in keys:
            to.inert(key, "no held-out data" if not held else "evaluation is off")
        return
    steps = to.value("eval_steps") or to.value("save_steps")
    to.verdict(
        "same",
        "eval_strategy",
        {"grpo.eval_strategy": strategy},
        "as save_strategy" if not to.given("eval_strategy") else "",
    )
    if strategy == "steps":
        to.verdict(
            "same", "eval_steps", {"grpo.eval_steps": steps}, "as save_steps" if not to.given("eval_steps") else ""
        )
    group, ranks = to.value("num_generations_eval") or to.value("num_generations"), to.world_size or 1
    unit = group // math.gcd(group, ranks)
    size = math.ceil(max(1, to.number("per_device_eval_batch_size")) / unit) * unit
    to.speed("per_device_eval_batch_size", "whole groups on all processes", {"grpo.per_device_eval_batch_size": size})
    if to.given("num_generations_eval"):
        to.same("num_generations_eval", "grpo.num_generations_eval")
