"""The common part of verl and EasyR1, its fork: a step is a rollout, sizes are prompts, and losses have other names.

Sources: core_algos.py, dp_actor.py, engine_workers.py and ray_trainer.py of both, and TRL 1.16's grpo_trainer.py.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import PurePosixPath
from typing import Any, NoReturn

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.adapters.named import adapter
from grpo_autotune.interop.frameworks.rollout_words import FAST, SAME, Keys, spelled, words_of
from grpo_autotune.interop.reading.files import beside
from grpo_autotune.interop.translation import SixNumbers, Translation, nested
from grpo_autotune.records.imported import Verdict
from grpo_autotune.units import plural

REPORTS = {"wandb", "swanlab", "tensorboard", "mlflow", "trackio", "clearml"}  # loggers that transformers has as well
EPSILON = "the source adds 1e-6 to the deviation, TRL 1e-4: 0.02 % at a deviation of 0.5"
HALVES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}


def refuse(t: Translation, key: str, what: str, fix: str | None = None) -> NoReturn:
    """ConfigError by the setting's line."""
    raise ConfigError(what, where=t.where(key), fix=fix)


def on(value: Any) -> bool:
    """True unless a setting is off, None or nothing."""
    return value not in (None, 0, "", [], {}) and str(value).lower() not in ("false", "null", "none", "disable")


def positive(t: Translation, key: str) -> Any:
    """A number above 0, or 0 for nothing, -1, and the like."""
    return max(0, t.number(key) or 0)


def count(t: Translation, key: str) -> int:
    """A whole number; ConfigError by line for anything else."""
    value = t.number(key)
    if value is None or value % 1:
        refuse(t, key, f"a whole number is needed, and the file says {value}")
    return int(value)


def unused(t: Translation, keys: Iterable[str], note: str) -> None:
    """Settings of the file without effect, of those that have no verdict yet."""
    for key in keys:
        if t.given(key) and key not in t.rows:
            t.inert(key, note)


def by_name(t: Translation) -> None:
    """Verdicts on keys with the same meaning under another name, and on those of the engine that change seconds."""
    framework = t.source.framework
    renamed(t, spelled(framework, SAME[framework]))
    renamed(t, spelled(framework, {f"rollout.{name}": f"vllm.{name}" for name in FAST[framework].split()}), "speed")


def explain(t: Translation) -> None:
    """Verdicts by the tables on what the file sets and nothing else was said of: by key, or by what it begins with.
    What has no equivalent and is switched off is the same."""
    notes = words_of(t.source.framework)
    for key in t.source.settings.keys() - t.rows.keys():
        starts = [start for start in notes if key == start or (start[-1] in "._@" and key.startswith(start))]
        if starts:
            verdict, note = notes[max(starts, key=len)]
            is_off = verdict == "none" and not on(t.value(key))
            t.verdict("same" if is_off else verdict, key, {}, "off" if is_off else note)


def renamed(t: Translation, targets: Mapping[str, str], verdict: Verdict = "same") -> None:
    """Settings with the same meaning under another name, where they have a value."""
    unused(t, [key for key in targets if t.value(key) is None], "not set")
    for key, target in targets.items():
        if t.value(key) is not None and (verdict == "same" or t.given(key)):
            t.verdict(verdict, key, {target: t.value(key)})


def below(t: Translation, prefix: str) -> dict[str, Any]:
    """Settings of the file whose keys begin so, by the rest of their names."""
    settings = t.source.settings
    return {key.removeprefix(prefix): settings[key].value for key in settings if key.startswith(prefix)}


def devices(t: Translation, keys: Keys, shards: Sequence[str]) -> int:
    """Data-parallel ranks: GPUs, over those that share a sequence or a model (the product of `shards`)."""
    gpus = count(t, keys.nodes) * count(t, keys.gpus)
    share = math.prod(int(positive(t, key) or 1) for key in shards)
    if gpus % share:
        refuse(t, next(filter(t.given, shards)), f"{gpus} GPUs cannot be divided into groups of {share}")
    for key in filter(t.given, shards):
        ranks = f"{plural(gpus, 'GPU')} are {plural(gpus // share, 'data-parallel rank')}"
        is_split = positive(t, key) > 1
        t.speed(key, f"TRL splits no sequence and no model: {ranks}") if is_split else t.inert(key, "nothing is split")
    return gpus // share


def batch(t: Translation, keys: Keys, micro: int, ranks: int, micro_keys: Iterable[str], note: str = "") -> None:
    """The six numbers. ConfigError where the framework itself refuses them."""
    group, prompts, mini, passes = (count(t, key) for key in (keys.group, keys.prompts, keys.mini, keys.passes))
    if mini > prompts:
        refuse(t, keys.mini, f"{mini} prompts per optimizer step, of a rollout of {prompts}: the framework refuses it")
    names = {keys.group: ["num_generations"], keys.prompts: ["steps_per_generation"], keys.passes: ["num_iterations"],
             keys.mini: ["gradient_accumulation_steps"], keys.nodes: [], keys.gpus: [],
             **{key: ["per_device_train_batch_size"] for key in micro_keys}}  # fmt: skip
    t.set_batch(SixNumbers(group, prompts, mini * group, passes, ranks, micro), names, note)


def kl(t: Translation, switch: str, coefficient: str, estimator: str) -> None:
    """The KL term of the loss."""
    if not on(t.value(switch)):
        t.converted(switch, {"grpo.beta": 0.0}, "no KL in the loss")
        return unused(t, (coefficient, estimator), f"without effect, as {switch} is off")
    beta, kind = t.number(coefficient), t.value(estimator)
    idle = "" if beta else "the source runs a reference model for nothing, TRL does not"
    t.same(coefficient, "grpo.beta", beta, idle)
    t.converted(switch, {"grpo.use_bias_correction_kl": False}, "TRL's default multiplies KL by the importance ratio")
    if kind in ("low_var_kl", "k3"):  # Schulman 2020
        return t.inert(estimator, "TRL's estimator; the source also clamps it to 10 per token")
    note = f"TRL has k3 alone, not {kind}: the same expectation of the value, another gradient"
    return t.changes(estimator, {}, note)


def clipping(t: Translation, keys: Keys, form: str, has_dual: bool) -> None:
    """Bounds of the importance ratio. `form` is `clip`, `cispo` or `sapo`."""
    low, high = t.number(keys.low), t.number(keys.high)
    if form == "sapo":
        unused(t, (keys.low, keys.high), "SAPO clips nothing")
    elif form == "cispo":
        t.converted(keys.high, {"grpo.epsilon_high": 1 + high}, f"TRL's is the largest ratio itself: 1 + {high:g}")
        note = f"the source raises smaller ratios to {1 - low:g}, TRL leaves them as they are"
        t.changes(keys.low, {}, note) if low < 1 else t.inert(keys.low, "no ratio is below 0")
    else:
        t.same(keys.low, "grpo.epsilon")
        t.same(keys.high, "grpo.epsilon_high")
    if has_dual and form == "clip" and t.value(keys.dual) is not None:
        t.same(keys.dual, "grpo.delta", float(t.number(keys.dual)), "bounds the ratio where the advantage is negative")
    unused(t, [keys.dual], "without effect in this loss")


def uneven(t: Translation) -> str:
    """The note on token-mean, where a rollout makes several optimizer steps; else nothing."""
    assert t.batch is not None
    if t.values["grpo.steps_per_generation"] == t.values["grpo.gradient_accumulation_steps"]:
        return ""
    share = 100 / math.sqrt(t.batch.completions)
    what = "TRL divides by the tokens of the rollout's average step, the source by the step's own: a step's gradient "
    return f"{what}differs by about {share:.0f} % where lengths spread as widely as their mean"


def rollouts(t: Translation, key: str, targets: Mapping[str, Any], step_key: str) -> None:
    """A setting counted in rollouts, as optimizer steps in `step_key`, beside fixed `targets`."""
    assert t.batch is not None
    note = f"{t.number(key):g} rollouts x {t.batch.steps_per_rollout:g} optimizer steps per rollout"
    t.converted(key, {**targets, step_key: t.steps(t.number(key))}, note)


def schedule(t: Translation, keys: Keys) -> None:
    """Warm-up and learning rate, which the source moves once per rollout, TRL once per optimizer step."""
    steps, kind, least = positive(t, keys.warmup_steps), str(t.value(keys.schedule)), positive(t, keys.least_rate)
    floor = "min_lr_rate" if keys.least_rate.endswith("ratio") else "min_lr"
    ratio = positive(t, keys.warmup_ratio)
    if steps:
        rollouts(t, keys.warmup_steps, {}, "grpo.warmup_steps")
        unused(t, [keys.warmup_ratio], f"{keys.warmup_steps} goes before it")
    else:
        t.converted(keys.warmup_ratio, {"grpo.warmup_steps": ratio}, "below 1 it is a share of all steps")
        unused(t, [keys.warmup_steps], "not above 0: the share holds")
    values: dict[str, Any] = {"grpo.lr_scheduler_type": "constant_with_warmup" if steps or ratio else "constant"}
    if kind in ("cosine", "linear"):
        has_floor = kind == "cosine" and least
        values = {"grpo.lr_scheduler_type": "cosine_with_min_lr" if has_floor else kind}
        values |= {"grpo.lr_scheduler_kwargs": {floor: least}} if has_floor else {}
        t.converted(keys.schedule, values, "TRL moves it with each optimizer step, the source once per rollout")
    elif kind == "constant":
        t.converted(keys.schedule, values, "TRL's default falls to 0")
    else:
        t.changes(keys.schedule, values, f"{kind} is not read")
    if kind == "linear" and least and floor == "min_lr":
        t.changes(keys.least_rate, {}, f"the source falls to {least:g}, TRL's linear schedule to 0")
    unused(t, [keys.least_rate], "in the row of the schedule" if kind == "cosine" else f"without effect with {kind}")


def betas(t: Translation, key: str) -> None:
    """Adam's."""
    values = t.value(key)
    if not isinstance(values, list) or [type(value) for value in values] != [float, float]:
        refuse(t, key, f"two numbers are needed, and the file says {values}")
    t.converted(key, {"grpo.adam_beta1": values[0], "grpo.adam_beta2": values[1]})


def cadence(t: Translation, keys: Keys, ends_early: bool) -> None:
    """The end of training, where a limit on steps goes before epochs, and checkpoints."""
    if positive(t, keys.steps):
        rollouts(t, keys.steps, {}, "grpo.max_steps")
        if ends_early and t.given(keys.epochs):
            t.changes(keys.epochs, {}, f"the source ends with whichever comes first, here with {keys.steps}")
        unused(t, [keys.epochs], f"{keys.steps} goes before it")
    else:
        t.same(keys.epochs, "grpo.num_train_epochs", note="the source drops the prompts that fill no rollout")
        unused(t, [keys.steps], "not set: the epochs hold")
    if positive(t, keys.save):
        rollouts(t, keys.save, {"grpo.save_strategy": "steps"}, "grpo.save_steps")
    else:
        t.converted(keys.save, {"grpo.save_strategy": "no"}, "no checkpoints")
    if positive(t, keys.keep):
        t.same(keys.keep, "grpo.save_total_limit")
    unused(t, [keys.keep], "no limit")


def evaluation(t: Translation, keys: Keys, sampling: Mapping[str, tuple[str, Any]], group_key: str) -> None:
    """Evaluation: how often, how many completions, and by which sampling (name in `eval_sampling` -> key, value)."""
    if not positive(t, keys.val):
        unused(t, (keys.val, group_key, *(key for key, _ in sampling.values())), "nothing is evaluated")
        if on(t.value(keys.val_first)):
            t.speed(keys.val_first, "the one evaluation before training is left out, as there is no other")
        unused(t, [keys.val_first], "off")
        return
    group, micro = int(t.number(group_key) or 1), t.values["grpo.per_device_train_batch_size"]
    rollouts(t, keys.val, {"grpo.eval_strategy": "steps"}, "grpo.eval_steps")
    t.same(keys.val_first, "grpo.eval_on_start", on(t.value(keys.val_first)))
    t.set("grpo.per_device_eval_batch_size", group * max(1, micro // group), "whole groups")
    t.same(group_key, "grpo.num_generations_eval", group, "completions of a prompt in evaluation")
    for name, (key, value) in sampling.items():
        if value is not None:
            t.same(key, f"eval_sampling.{name}", value)


def redraw(t: Translation, key: str, tries: int, fetched_key: str, note: str) -> None:
    """Groups without a difference are drawn again: as many prompts as the source's `tries` (0: any number) fetch."""
    assert t.batch is not None
    fetched = int(positive(t, fetched_key)) or t.batch.prompts
    limit = f"; there {tries} generations of {fetched} prompts end the run, and here it goes on" if tries else ""
    t.changes(key, {"resample.max_rounds": max(2, math.ceil(tries * fetched / t.batch.prompts) or 10)}, note + limit)


def naming(t: Translation, keys: Keys) -> None:
    """Name of the run, and where it is reported."""
    names = re.findall(r"\w+", str(t.value(keys.logger) or ""))
    lost = ", ".join(sorted({*names} - REPORTS))
    note = f"{lost}: the terminal and the files of the run folder are always written" if lost else ""
    t.converted(keys.logger, {"grpo.report_to": [name for name in names if name in REPORTS] or "none"}, note)
    name = str(t.value(keys.run) or "")
    if "$" in name:
        t.speed(keys.run, "known only where the script runs; the name of the file is the run's")
    elif t.given(keys.run):
        t.same(keys.run, "output.name", re.sub(r"[^\w.-]+", "-", name).strip("-."))


def lora(t: Translation, keys: Keys, modules: Any) -> bool:
    """LoRA, where its rank is above 0; True if so. `modules` are the adapted ones, as PEFT has them."""
    if not positive(t, keys.rank):
        unused(t, (keys.rank, keys.alpha, keys.adapted, keys.kept_out), "no LoRA: its rank is 0")
        return False
    t.same(keys.rank, "peft.r")
    t.same(keys.alpha, "peft.lora_alpha")
    has_tower = modules == "all-linear" and not on(t.value(keys.kept_out))
    t.same(keys.adapted, "peft.target_modules", modules, "a vision tower's layers as well" if has_tower else "")
    if on(t.value(keys.kept_out)):
        t.same(keys.kept_out, "peft.exclude_modules")
    return True


def weights(t: Translation, key: str, is_lora: bool) -> None:
    """Type of the trained weights: float32 with bfloat16 arithmetic, unless the file says otherwise."""
    if kind := HALVES.get(str(t.value(key)).lower()):
        return t.same(key, "model.dtype", kind)
    if is_lora:
        note = "frozen weights are bfloat16 in the arithmetic either way; the adapter's stay in float32"
        return t.converted(key, {"model.dtype": "bfloat16"}, note)
    note = "float32 weights cost 4 bytes each; in bfloat16 the updates of a small learning rate round to nothing"
    return t.converted(key, {"model.dtype": "float32", "grpo.bf16": True}, note)


def engine(t: Translation, keys: Keys) -> None:
    """vLLM in the training processes, and its sampling."""
    t.set("grpo.use_vllm", True)
    t.set("vllm.mode", "colocate")
    t.same(keys.memory, "vllm.gpu_memory_utilization", note="of the whole GPU")
    wanted, ranks = count(t, keys.parallel), t.world_size or 1
    fits = math.gcd(wanted, ranks)
    note = f"groups of {wanted} there, which do not divide the number of processes here, {ranks}"
    t.speed(keys.parallel, "" if fits == wanted else note, {"vllm.tensor_parallel_size": fits})
    t.same(keys.top_k, "grpo.top_k", positive(t, keys.top_k), "all tokens" if not positive(t, keys.top_k) else "")


def prompts(t: Translation, keys: Keys) -> None:
    """Lengths, and what happens to prompts that are too long."""
    longest, completion = count(t, keys.longest_prompt), count(t, keys.longest_completion)
    cut = str(t.value(keys.overflow))
    t.same(keys.longest_completion, "grpo.max_completion_length")
    t.same(keys.longest_prompt, "data.max_prompt_tokens", note="with the chat template and the tokens of images")
    t.set("vllm.max_model_len", longest + completion, "longest prompt and completion together")
    if on(t.value(keys.filter_prompts)):
        t.same(keys.filter_prompts, "data.prompt_overflow", "filter")
        return unused(t, [keys.overflow], "prompts that are too long are filtered before")
    unused(t, [keys.filter_prompts], f"off: {keys.overflow} holds")
    if cut in ("error", "left"):
        return t.same(keys.overflow, "data.prompt_overflow")
    note = f"no prompt is cut on the {cut} here: it is an error"
    return t.changes(keys.overflow, {"data.prompt_overflow": "error"}, note)


def columns(t: Translation, names: Mapping[str, str]) -> dict[str, str]:
    """Our name of a column -> the source's, where it is another: `names` are the keys of the data that say it."""
    for name in names.values():
        t.inert(f"data.{name}", f"the column {t.value(f'data.{name}')}")
    return {ours: str(t.value(f"data.{name}")) for ours, name in names.items() if t.value(f"data.{name}") != ours}


def files(t: Translation, keys: Keys, shared: Mapping[str, Any]) -> None:
    """Training files and held-out ones, each read with the `shared` keys of the data section; several are a mixture."""
    train = _paths(t.value(keys.train_files))
    held = _paths(t.value(keys.val_files)) if positive(t, keys.val) else []
    if not train:
        refuse(t, keys.train_files, "no training data")
    if len(train) == 1:
        t.converted(keys.train_files, {f"data.{key}": value for key, value in {**train[0], **shared}.items()}, "")
        one = {f"data.eval_{key}": value for key, value in held[0].items()} if len(held) == 1 else {}
        values: dict[str, Any] = one or ({"data.eval": _named(held)} if held else {})
    else:
        parts = {name: {**place, **deepcopy(shared)} for name, place in _named(train).items()}
        for part, place in zip(parts.values(), held, strict=False):
            part |= {f"eval_{key}": value for key, value in place.items()}
        values = {"data.mix": parts}
        t.converted(keys.train_files, {"data.path": "several files", **values}, "each row once per epoch")
    lost = len(held) - len(train) if len(train) > 1 else 0
    if lost > 0:
        t.changes(keys.val_files, values, f"a held-out file for each training file: the last {lost} are left out")
    elif held:
        t.converted(keys.val_files, values, "")
    unused(t, [keys.val_files], "nothing is evaluated")


def _paths(value: Any) -> list[dict[str, str]]:
    """Path, and split behind an `@`, of each file of a setting: a text, or a list of them."""
    texts = value if isinstance(value, list) else re.split(r"\s*,\s*", str(value or "").strip("[] "))
    pairs = [re.fullmatch(r"(.+?)(?:@([\w\[\]:%+]+))?", str(text).strip("'\" ")) for text in texts]
    return [{"path": pair[1], **({"split": pair[2]} if pair[2] else {})} for pair in pairs if pair]


def _named(places: Sequence[Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The files by names of their own: the last part of the path, with the folder before it where several share it."""
    named: dict[str, dict[str, str]] = {}
    for place in places:
        path = PurePosixPath(place["path"])
        names = (path.stem, f"{path.parent.name}_{path.stem}", f"{path.stem}_{len(named)}")
        named[next(name for name in (re.sub(r"\W", "_", name) for name in names) if name not in named)] = dict(place)
    return named


def reward(
    t: Translation, style: str, key: str, path: str, function: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The item of `rewards` that calls the user's function by an adapter, whose file is added."""
    file = beside(t.source.path, path)
    made = adapter(style, str(file or path), function, nested(arguments))
    t.files[made.name] = made.text
    note = f"called unchanged by {made.name}" + ("" if file else f"; {path} is not here: correct its path there")
    t.converted(key, {"rewards": [made.reward]}, note)
    return made.reward
