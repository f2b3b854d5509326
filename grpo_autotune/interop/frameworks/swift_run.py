"""The model, the data, the rewards, the loss and the engine of ms-swift's GRPO."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from grpo_autotune.config.sections.vllm import engine_names
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.adapters.named import NAMED, adapter
from grpo_autotune.interop.frameworks import swift_keys
from grpo_autotune.interop.reading.files import beside, text_of
from grpo_autotune.interop.translation import Translation

OURS = {"query": "prompt", "question": "prompt", "messages": "prompt"}  # swift's columns -> ours, where they differ
ENGINE = (  # keys of the engine beside those that begin with `vllm_`
    "sleep_level", "rollout.gpus", "structured_outputs_regex", "rollout_importance_sampling_mode",
    "rollout_importance_sampling_threshold",
)  # fmt: skip
OF_REWARDS = r"cosine_m|repetition_(n_grams|max_penalty)|soft_(max|cache)_length"  # settings that rewards read
UNENDED = "a completion that ends so has no end token, and counts as truncated here"
HUB = "an id of ModelScope, if it is no path: see that the Hugging Face hub has the same"
ELSEWHERE = r"(?i)[/.~$]|hf::|.*\.(jsonl?|csv|parquet|txt|arrow)\b"  # paths, or ids of the Hugging Face hub


def translate(to: Translation) -> None:
    """Verdicts of all settings but the batch and how GPUs share the work, which come before and after."""
    for part in (_model, _adapter, _data, _prompts, _rewards, _loss, _schedule, _evaluation, _engine):
        part(to)
    for key, target in swift_keys.SAME.items():
        values = words(to.value(key))
        if key not in to.rows and values not in ([None], []) and not isinstance(values[0], Mapping | list):
            value, more = swift_keys.SPELLED.get(key, {}).get(values[0], values[0]), values[1:]
            to.verdict("changes" if more else "same", key, {target: value}, "the first alone" if more else "")


def words(value: Any) -> list[Any]:
    """Several words of a command line, of which one is no list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, of which a command line has the JSON."""
    with suppress(json.JSONDecodeError):
        value = json.loads(value) if isinstance(value, str) else value
    return dict(value) if isinstance(value, Mapping) else {}


def _model(to: Translation) -> None:
    if not to.given("model"):
        raise ConfigError("no model", where=to.where("model"), fix="Give --model.")
    name, sees = str(to.value("model")), any(map(to.given, swift_keys.PIXELS))
    sees = sees or re.search(swift_keys.VISION, name) is not None
    to.same("model", "model.name_or_path", name, _elsewhere(to, name), "" if sees else "taken for a text model")
    if sees:
        note = "taken for a model that sees images; its frozen tower gets no adapters either"
        to.same("freeze_vit", "model.freeze_vision_tower", bool(to.value("freeze_vit")), note)
    else:
        to.inert("freeze_vit", "taken for a text model")
    everything = to.value("tuner_type") == "full" or "all-linear" in words(to.value("target_modules"))
    if sees and everything and bool(to.value("freeze_aligner")) != bool(to.value("freeze_vit")):
        to.dropped("freeze_aligner", "the projector goes with the vision tower: trained with it, or frozen with it")
    if to.value("torch_dtype") in ("float16", "float32") and not to.given("bf16"):
        to.set("grpo.fp16", True, "swift's for weights in float16 or float32")
        to.set("grpo.bf16", False)
    if to.value("quant_bits") == 4 and to.value("quant_method", "bnb") == "bnb":
        to.same("quant_bits", "model.load_in_4bit", True)
    for key in filter(to.given, swift_keys.FIXED):
        ours = swift_keys.FIXED[key]
        to.inert(key, "as here") if to.value(key) == ours else to.changes(key, {}, f"{ours} here")


def _elsewhere(to: Translation, *names: str) -> str:
    on_hub = to.value("use_hf") is True or str(to.value("USE_HF")) in ("1", "true", "True")
    return "" if on_hub or all(re.match(ELSEWHERE, name) for name in names) else HUB


def _adapter(to: Translation) -> None:
    kind, given = to.value("tuner_type"), [*filter(to.given, swift_keys.PEFT)]
    trained = words(to.value("adapters", []))
    if trained:
        reference = "adapter" if to.value("ref_adapters") else "base"
        to.same("adapters", "model.adapter", trained[0])
        to.converted("ref_adapters", {"model.adapter_reference": reference}, "the reference of the KL term")
    if trained or kind == "full":
        note = "the adapter's own configuration holds" if trained else "the whole model is trained"
        to.inert(("tuner_type", *given), note)
        return
    note = "" if kind in ("lora", "lora_llm") else f"LoRA instead of {kind}"
    if kind == "lora_llm" and not (to.value("freeze_vit") and to.value("freeze_aligner")):
        note = "LoRA in the vision tower too, all of whose weights are trained there"
    to.verdict("changes" if note else "same", "tuner_type", {}, note or "a peft section")
    targets = "target_regex" if "target_regex" in given else "target_modules"  # swift reads the expression alone
    if targets != "target_modules" in given:
        to.inert(given.pop(given.index("target_modules")), "target_regex wins")
    for key in dict.fromkeys(["lora_rank", "lora_alpha", "lora_dropout", targets, *given]):
        value = words(to.value(key)) if key in swift_keys.LISTS else to.value(key)
        value = "all-linear" if key == "target_modules" and "all-linear" in value else value
        to.same(key, swift_keys.PEFT[key], value)


def _data(to: Translation) -> None:
    """The data sets: one, or the parts of a mixture, each of which has the keys of `everywhere`."""
    named = [str(text) for text in words(to.value("dataset", []))]
    parts = [part for text in named for part in _parts(text, bool(to.value("dataset_shuffle")))]
    if not parts:
        raise ConfigError("no dataset", where=to.where("dataset"), fix="Give --dataset.")
    stems = [re.sub(r"\W", "_", PurePosixPath(part["path"]).stem) for part in parts]
    mixed = {f"data.mix.{stem}_{number}": part for number, (stem, part) in enumerate(zip(stems, parts, strict=True), 1)}
    sets = mixed if len(parts) > 1 else {"data": parts[0]}
    targets = {f"{place}.{key}": value for place, part in sets.items() for key, value in part.items()}
    written = next((text for text in named if re.search(swift_keys.PREPARED, text)), None)
    note = f"swift's code writes the prompts of {written} (swift/dataset): use data.prompt_template" if written else ""
    to.comments[next(iter(targets))] = "swift looks for the prompt's column: name it in data.columns"
    targets = {"data.path": "mixture", **targets} if parts[1:] else targets
    to.verdict("changes" if written else "converted", "dataset", targets, note or _elsewhere(to, *named))

    def everywhere(key: str, name: str, value: Any, note: str = "") -> None:
        to.converted(key, {f"{place}.{name}": value for place in sets}, note)

    if columns := mapping(to.value("columns")):
        ours = {OURS.get(swifts, swifts): theirs for theirs, swifts in columns.items()}
        everywhere("columns", "columns", ours, "swift's are theirs: ours; here ours: theirs")
    if held := words(to.value("val_dataset") or []):
        part = next(_parts(str(held[0]), False))
        note = "" if len(held) == 1 and part.keys() == {"path"} else "the first of them, all its rows"
        targets = {f"{next(iter(sets))}.eval_path": part["path"]}
        to.verdict("changes" if note else "converted", "val_dataset", targets, note)
    elif (ratio := to.value("split_dataset_ratio")) and _evaluates(to) == "no":
        to.verdict("same", "split_dataset_ratio", {}, "nothing is evaluated, so nothing is held out")
    elif ratio:
        everywhere("split_dataset_ratio", "split_ratio", ratio)
    if text := str(to.value("system") or "").replace("\\n", "\n"):
        path = beside(to.source.path, text) if text.endswith(".txt") else None
        if path is None and text.endswith(".txt"):
            to.dropped("system", "the file is not at hand: its text belongs into data.system_prompt")
        else:
            note = f"the text of {path.name}" if path else ""
            everywhere("system", "system_prompt", text_of(path) if path else text, note)


def _parts(text: str, shuffled: bool) -> Iterator[dict[str, Any]]:
    match = re.fullmatch(r"(?:(?i:hf|ms)::)?(?P<path>[^#:]+)(?::(?P<sets>[^#]+))?(?:#(?P<rows>\d+))?", text)
    path, subsets, rows = match.group("path", "sets", "rows") if match else (text, None, None)
    limit = {"subsample" if shuffled else "max_samples": int(rows)} if rows else {}
    for subset in subsets.split("/") if subsets else [None]:
        yield {"path": path.strip(), **({"name": subset.strip()} if subset else {}), **limit}


def _prompts(to: Translation) -> None:
    edge = 28 if re.search(swift_keys.PATCHES_OF_28, str(to.value("model"))) else 32
    for key, target in swift_keys.PIXELS.items():
        if to.given(key):
            pixels = to.number(key) * (edge**2 if key.endswith("TOKEN_NUM") else 1)
            to.converted(key, {target: pixels}, "the processor rounds to whole patches there as here")
    if to.value("max_length"):
        to.same("max_length", "data.max_prompt_tokens", note="of the prompt alone, with GRPO")
        cuts = to.value("truncation_strategy") == "left"
        sees = "model.freeze_vision_tower" in to.values
        note = "a prompt with an image is not cut here: it stops the run" if sees else ""
        note = note if cuts else "swift takes another row instead"
        to.converted("truncation_strategy", {"data.prompt_overflow": "left" if cuts else "filter"}, note)
    else:
        to.inert("truncation_strategy", "without max_length")
    if to.value("enable_thinking") is not None:
        to.same("enable_thinking", "grpo.chat_template_kwargs", {"enable_thinking": to.value("enable_thinking")})


def _rewards(to: Translation) -> None:
    names = [str(name) for name in words(to.value("reward_funcs"))]
    plugins = [str(name) for name in words(to.value("external_plugins", []))]
    settings = [key for key in {**swift_keys.DEFAULTS, **to.source.settings} if re.match(OF_REWARDS, key)]
    arguments = {key: to.value(key) for key in settings}
    for key in ("cosine_max_len", "soft_max_length"):
        arguments[key] = arguments.get(key) or to.value("max_completion_length")
    weights, items, notes, read = words(to.value("reward_weights", [])), [], [], set[str]()
    unsure = False
    if "soft_overlong" in names and not to.value("soft_cache_length"):
        raise ConfigError("soft_overlong needs soft_cache_length, there too", where=to.where("reward_funcs"))
    for name in names:
        known = NAMED.get(("swift", name))
        if known is not None and known.name:
            items.append(known.item(arguments))
            read |= {*known.settings.values()}
            notes += [f"{name}: {known.note}"] if known.note else []
        elif plugins:
            files = [beside(to.source.path, plugin) for plugin in plugins]
            file = next((file for file in files if file is not None and name in text_of(file)), None)
            unsure |= file is None and len(plugins) > 1
            made = adapter("swift", str(file or plugins[0]), name, arguments)
            to.files[made.name] = made.text
            items.append(dict(made.reward))
        else:
            what = f"the reward {name} of ms-swift has no counterpart"
            fix = "Write it as a function (docs/rewards.md), or name the plugin that registers it: external_plugins."
            raise ConfigError(what, where=to.where("reward_funcs"), fix=fix)
    if weights and len(weights) != len(items):
        raise ConfigError(f"{len(weights)} weights of {len(items)} rewards", where=to.where("reward_weights"))
    for item, weight in zip(items, weights, strict=False):
        item["weight"] = float(weight)
    to.verdict("changes" if notes else "converted", "reward_funcs", {"rewards": items}, "; ".join(notes))
    for key in filter(to.given, settings):
        to.converted(key, {}, "in rewards") if to.files or key in read else to.inert(key, "no reward reads it")
    away = next((plugin for plugin in plugins if beside(to.source.path, plugin) is None), None)
    to.converted("reward_weights", {}, "in rewards")
    where = f"; {away} is not here: correct its path there" if away else ""
    if plugins and not to.files:
        to.dropped("external_plugins", "no reward of it is named; what else it registers is not read")
    elif unsure:
        to.changes("external_plugins", {}, "they are not at hand: the first is taken to register the rewards")
    else:
        to.converted("external_plugins", {}, f"in rewards{where}")


def _loss(to: Translation) -> None:
    kind, beta = str(to.value("loss_type")), to.number("beta") or 0
    to.same("beta", "grpo.beta", beta)
    if beta:
        to.set("grpo.use_bias_correction_kl", False, "swift does not multiply the KL term by the ratio")
    if beta and to.value("ref_model", to.value("model")) != to.value("model"):
        to.dropped("ref_model", "the reference is the model before training")
    if to.batch is not None and swift_keys.LOSSES[kind]:
        _same_clipping(to, kind, to.batch.rollout // (to.batch.ranks * to.batch.micro_batch))
    if to.value("importance_sampling_level") == "sequence_token":
        note = "the same gradient, as all tokens of a completion have one advantage (arXiv 2507.18071, section 4.3)"
        to.converted("importance_sampling_level", {"grpo.importance_sampling_level": "sequence"}, note)
    if to.value("scale_rewards") == "gdpo":
        target = {"grpo.multi_objective_aggregation": "normalize_then_sum"}
        to.converted("scale_rewards", target, "with 1e-8 there, and 1e-4 here, added to a standard deviation")
    differs = (swift_keys.LOSSES[kind], to.number("top_entropy_quantile", 1.0) < 1, beta)
    for differing, (key, note) in zip(differs, swift_keys.NEARLY.items(), strict=True):
        if differing and to.value(key):
            to.changes(key, {swift_keys.SAME.get(key, f"grpo.{key}"): to.value(key)}, note)
    if to.value("dynamic_sample"):
        rounds = max(2, to.number("max_resample_times"))
        note = f"{rounds} generations at most; where they do not suffice, swift trains on the first as it was"
        to.changes(("dynamic_sample", "max_resample_times"), {"resample.max_rounds": rounds}, note)


def _same_clipping(to: Translation, kind: str, factor: int) -> None:
    """TRL divides by the optimizer step's share of a rollout's tokens, swift by all of them and the accumulation: TRL's
    gradient is larger by the micro steps of a rollout, which clipping feels, and Adam in its epsilon alone."""
    note = f"the gradient of {kind} is 1/{factor} of TRL's there ({factor} micro steps per rollout)"
    for key, usual in (("max_grad_norm", 1.0), ("adam_epsilon", 1e-8)) if factor > 1 else ():
        to.converted(key, {f"grpo.{key}": (to.number(key) or usual) * factor}, note, note)


def _schedule(to: Translation) -> None:
    stop = [word for word in words(to.value("stop_words", [])) if word]
    if stop and to.value("use_vllm"):
        to.changes("stop_words", {"grpo.generation_kwargs": {"stop": stop}}, UNENDED)
    elif stop:
        to.dropped("stop_words", "needs grpo.use_vllm")
    usual = 1e-5 if to.value("tuner_type") == "full" else 1e-4
    rate, least, ratio = to.number("learning_rate") or usual, to.number("min_lr"), to.number("warmup_ratio")
    to.same("learning_rate", "grpo.learning_rate", rate)
    if ratio:
        to.converted("warmup_ratio", {"grpo.warmup_steps": ratio}, "below 1 it is a share of all steps")
    else:
        to.inert("warmup_ratio", "no warm-up")
    if least:
        falls = {"grpo.lr_scheduler_type": "cosine_with_min_lr", "grpo.lr_scheduler_kwargs": {"min_lr": least}}
        targets = falls if least < rate else {"grpo.lr_scheduler_type": "constant_with_warmup"}
        to.converted(("lr_scheduler_type", "min_lr"), targets, f"from {rate:g} to {least:g}")
    if to.value("lr_scheduler_type") in ("WSD", "inverse-square-root"):
        to.changes("lr_scheduler_type", {"grpo.lr_scheduler_type": "constant_with_warmup"}, "the rate stays")
    if to.given("max_steps") and to.given("num_train_epochs"):
        to.inert("num_train_epochs", "max_steps wins")


def _evaluates(to: Translation) -> Any:
    return to.value("eval_strategy") or to.value("save_strategy")


def _evaluation(to: Translation) -> None:
    strategy = _evaluates(to)
    if strategy == "no" or not (to.value("val_dataset") or to.value("split_dataset_ratio")):
        evaluating = r"(per_device_eval|eval_|num_generations_eval)"
        to.inert([key for key in to.source.settings if re.match(evaluating, key)], "nothing is evaluated")
        return
    to.verdict("same", "eval_strategy", {"grpo.eval_strategy": strategy})
    if strategy == "steps":
        to.verdict("same", "eval_steps", {"grpo.eval_steps": to.value("eval_steps") or to.value("save_steps")})
    group = to.number("num_generations_eval") or to.number("num_generations")
    unit = group // math.gcd(group, to.world_size or 1)
    size = -(-to.number("per_device_eval_batch_size") // unit) * unit
    to.speed("per_device_eval_batch_size", "whole groups", {"grpo.per_device_eval_batch_size": size})


def _engine(to: Translation) -> None:
    keys = [key for key in to.source.settings if key.startswith("vllm_") or key in ENGINE]
    if not (to.value("use_vllm") or to.value("use_lmdeploy")):
        to.inert(keys, "without vLLM")
        return
    other = bool(to.value("use_lmdeploy"))
    key, note = ("use_lmdeploy", "vLLM instead") if other else ("use_vllm", "")
    to.verdict("speed" if other else "same", key, {"grpo.use_vllm": True}, note)
    _correction(to)
    server = to.value("vllm_mode") == "server" or to.given("vllm_server_host") or to.given("vllm_server_base_url")
    workers = int(to.number("num_infer_workers") or 0)  # before 3.5: GPUs beside the trainer's
    apart = workers if to.batch is not None and workers < to.batch.ranks else 0
    if to.given("rollout.gpus"):
        apart = 0 if "rollout" in str(to.value("colocate_groups")) else int(to.number("rollout.gpus"))
    apart = 0 if server else apart
    if server:
        note = "swift rollout speaks another protocol: start grpo-autotune serve, or set vllm.server_gpus"
        to.converted("vllm_mode", {"vllm.mode": "server"}, note)
    elif apart:
        key = "rollout.gpus" if to.given("rollout.gpus") else "num_infer_workers"
        to.same(key, "vllm.server_gpus", apart, "GPUs of the engine alone")
    else:
        to.verdict("same", "vllm_mode", {"vllm.mode": "colocate"})
    if not server:
        to.same("vllm_gpu_memory_utilization", "vllm.gpu_memory_utilization")
        if to.given("vllm_tensor_parallel_size"):
            shared = math.gcd(to.number("vllm_tensor_parallel_size"), apart or to.world_size or 1)
            to.speed("vllm_tensor_parallel_size", "of the processes there are", {"vllm.tensor_parallel_size": shared})
    for key in keys:
        if key not in to.rows and to.value(key) is not None:
            _engine_key(to, key, at_server=server)


def _engine_key(to: Translation, key: str, *, at_server: bool) -> None:
    name, value = key.removeprefix("vllm_"), to.value(key)
    if name == "server_pass_dataset":
        return
    if at_server != name.startswith("server_"):
        to.inert(key, "a server has options of its own" if at_server else "no such server")
    elif key == "vllm_server_port" and not isinstance(value, list):
        to.same(key, "vllm.server_port", to.number(key))
    elif key == "sleep_level":
        to.same(key, "vllm.sleep_level") if value else to.inert(key, "no sleep")
    elif key == "vllm_enable_lora":
        to.speed(key, "adapters alone" if value else "off", {"vllm.weight_sync": "adapter"} if value else {})
    elif key == "vllm_engine_kwargs":
        inside = mapping(value)
        lost = ", ".join(sorted(inside.keys() - engine_names()))
        targets = {f"vllm.{name}": part for name, part in inside.items() if name in engine_names()}
        to.verdict("changes" if lost else "converted", key, targets, f"not known here: {lost}" if lost else "")
    elif name in engine_names() and swift_keys.verdict_of(key) is None:
        to.same(key, f"vllm.{name}", mapping(value) or value)


def _correction(to: Translation) -> None:
    prefix, mode = "grpo.vllm_importance_sampling_", str(to.value("rollout_importance_sampling_mode") or "")
    if not mode:
        to.set(f"{prefix}correction", False, "off in swift; TRL's is on, and costs a pass")
        return
    limit = to.number("rollout_importance_sampling_threshold")
    targets = {f"{prefix}correction": True, f"{prefix}mode": mode, f"{prefix}clip_max": limit}
    product = "a sequence's ratio is the geometric mean of its tokens' there, and their product here"
    notes = [product] if mode.startswith("sequence") else []
    notes += ["the KL term is weighted there as well"] if to.value("beta") else []
    keys = ("rollout_importance_sampling_mode", "rollout_importance_sampling_threshold")
    to.verdict("changes" if notes else "converted", keys, targets, "; ".join(notes))
