"""What verl and EasyR1, its fork, have in common: a step is a rollout, sizes are prompts, and losses have other names.

Each function gives verdicts on a few settings, whose keys come from a framework's `Keys`. Sources: verl's
core_algos.py, dp_actor.py, engine_workers.py and ray_trainer.py, those of EasyR1, and TRL 1.16's grpo_trainer.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.batch import SixNumbers
from grpo_autotune.interop.translation import Translation
from grpo_autotune.records.imported import Verdict


@dataclass(frozen=True)
class Keys:
    """One framework's names."""

    group: str
    prompts: str
    mini: str
    passes: str
    nodes: str
    gpus: str
    estimator: str
    low: str
    high: str
    dual: str
    warmup_steps: str
    warmup_ratio: str
    schedule: str
    least_rate: str
    epochs: str
    steps: str
    save: str
    keep: str
    val: str
    val_first: str
    logger: str
    run: str
    rank: str
    alpha: str
    adapted: str
    kept_out: str
    parallel: str
    top_k: str
    longest_prompt: str
    longest_completion: str
    filter_prompts: str
    overflow: str
    train_files: str = "data.train_files"
    val_files: str = "data.val_files"


REPORTS = frozenset("wandb swanlab tensorboard mlflow trackio comet_ml clearml dvclive".split())
"""Loggers that transformers has as well."""

K3 = ("low_var_kl", "k3")
"""Names of the estimator of KL that TRL has (Schulman 2020)."""


def refuse(t: Translation, key: str, what: str, fix: str | None = None) -> NoReturn:
    """ConfigError by the setting's line."""
    raise ConfigError(what, where=t.where(key), fix=fix)


def on(value: Any) -> bool:
    """True unless a setting is off, null or nothing."""
    return value not in (False, None, 0, "", [], {}) and str(value).lower() not in ("false", "null", "none")


def explain(t: Translation, words: Mapping[str, tuple[Verdict, str]]) -> None:
    """Verdicts on what the file sets and nothing else was said of: by key, or by what the key begins with. What has no
    equivalent and is switched off is the same."""
    for key in t.source.settings.keys() - t.rows.keys():
        starts = [start for start in words if key == start or (start[-1] in "._" and key.startswith(start))]
        if starts:
            verdict, note = words[max(starts, key=len)]
            is_off = verdict == "no equivalent" and not on(t.value(key))
            t.verdict("same" if is_off else verdict, key, {}, "off" if is_off else note)


def renamed(t: Translation, targets: Mapping[str, str]) -> None:
    """Settings with the same meaning under another name, where they have a value."""
    for key, target in targets.items():
        if t.value(key) is not None:
            t.same(key, target)
        elif t.given(key):
            t.inert(key, "not set")


def below(t: Translation, prefix: str) -> dict[str, Any]:
    """Settings of the file whose keys begin so, by the rest of their names."""
    return {
        key.removeprefix(prefix): setting.value for key, setting in t.source.settings.items() if key.startswith(prefix)
    }


def devices(t: Translation, keys: Keys, shards: Iterable[str]) -> int:
    """Data-parallel ranks: GPUs, over those that share a sequence or a model (the product of `shards`)."""
    shards = list(shards)
    gpus = t.number(keys.nodes) * t.number(keys.gpus)
    share = math.prod(max(1, t.number(key, 1) or 1) for key in shards)
    if gpus % share:
        refuse(t, shards[0], f"{gpus} GPUs cannot be divided into groups of {share}")
    for key in shards:
        if t.given(key):
            note = f"TRL splits no sequence and no model: {gpus} GPUs are {gpus // share} data-parallel processes"
            t.verdict("same" if t.number(key) in (None, 1) else "speed only", key, {}, note)
    return int(gpus // share)


def batch(t: Translation, keys: Keys, micro: int, ranks: int, micro_keys: Iterable[str], note: str) -> None:
    """The six numbers. ConfigError where the framework itself refuses them."""
    group, prompts, mini, passes = (int(t.number(key)) for key in (keys.group, keys.prompts, keys.mini, keys.passes))
    if mini > prompts:
        refuse(t, keys.mini, f"{mini} prompts per optimizer step, of a rollout of {prompts}: the framework refuses it")
    read = [keys.group, keys.prompts, keys.mini, keys.passes, keys.nodes, keys.gpus, *micro_keys]
    t.set_batch(SixNumbers(group, prompts, mini * group, passes, ranks, micro), read, note)


def kl(t: Translation, switch: str, coefficient: str, estimator: str) -> None:
    """The KL term of the loss."""
    if not on(t.value(switch)):
        t.converted(switch, {"grpo.beta": 0.0}, "no KL in the loss")
        for key in (coefficient, estimator):
            if t.given(key):
                t.inert(key, f"without effect, since {switch} is off")
        return
    beta = t.number(coefficient)
    t.same(coefficient, "grpo.beta", beta, "" if beta else "TRL then runs no reference model, which costs time here")
    note = "TRL multiplies KL by the importance ratio unless told not to"
    t.converted(switch, {"grpo.use_bias_correction_kl": False}, note)
    kind = t.value(estimator)
    if kind in K3:
        t.same(estimator, "grpo.beta", beta, "TRL's estimator; the source also clamps it to 10 per token")
    else:
        note = f"TRL has k3 alone, not {kind}: the same expectation at the start, another gradient"
        t.changes(estimator, {"grpo.beta": beta}, note)


def clipping(t: Translation, keys: Keys, form: str, has_dual: bool) -> None:
    """Bounds of the importance ratio. `form` is `clip`, `cispo` or `sapo`."""
    low, high = t.number(keys.low), t.number(keys.high)
    has_dual = has_dual and form == "clip" and t.value(keys.dual) is not None
    if form == "sapo":
        for key in (keys.low, keys.high):
            t.inert(key, "SAPO clips nothing")
    elif form == "cispo":
        note = f"TRL's is the largest ratio itself: 1 + {high:g}"
        t.converted(keys.high, {"grpo.epsilon_high": 1 + high}, note)
        if low < 1:
            note = f"the source raises ratios below {1 - low:g} to that, TRL leaves them: tokens that became less likely weigh less"
            t.changes(keys.low, {}, note)
    else:
        t.same(keys.low, "grpo.epsilon")
        t.same(keys.high, "grpo.epsilon_high")
    if has_dual:
        t.same(keys.dual, "grpo.delta", float(t.number(keys.dual)), "bounds the ratio where the advantage is negative")
    elif t.given(keys.dual):
        t.inert(keys.dual, "without effect in this loss")


def schedule(t: Translation, keys: Keys) -> None:
    """Warm-up and learning rate, which the source moves once per rollout, TRL once per optimizer step."""
    steps, ratio = t.number(keys.warmup_steps) or 0, t.number(keys.warmup_ratio) or 0
    per_rollout = t.steps(1)
    warmup = t.steps(steps) if steps > 0 else ratio
    if steps > 0:
        t.converted(keys.warmup_steps, {"grpo.warmup_steps": warmup}, rollouts(t, steps))
        if t.given(keys.warmup_ratio):
            t.inert(keys.warmup_ratio, f"{keys.warmup_steps} goes before it")
    else:
        t.converted(keys.warmup_ratio, {"grpo.warmup_steps": warmup}, "below 1 it is a share of all steps")
        if t.given(keys.warmup_steps):
            t.inert(keys.warmup_steps, "not positive: the share holds")
    kind, least = str(t.value(keys.schedule)), t.number(keys.least_rate) or 0
    if kind not in ("constant", "cosine"):
        t.changes(keys.schedule, {"grpo.lr_scheduler_type": "constant_with_warmup"}, f"{kind} is not known here")
        return
    values: dict[str, Any] = {"grpo.lr_scheduler_type": "constant_with_warmup" if warmup else "constant"}
    if kind == "cosine":
        values = {"grpo.lr_scheduler_type": "cosine_with_min_lr" if least else "cosine"}
        values |= {"grpo.lr_scheduler_kwargs": {"min_lr_rate": least}} if least else {}
    note = f"TRL moves it with each optimizer step, the source after {per_rollout}" if kind == "cosine" else ""
    t.converted(keys.schedule, values, note)
    if t.given(keys.least_rate):
        t.inert(keys.least_rate, f"without effect with {kind}") if kind != "cosine" else t.converted(
            keys.least_rate, values, ""
        )


def rollouts(t: Translation, count: float) -> str:
    """The arithmetic of a number of rollouts in optimizer steps."""
    per_rollout = 1.0 if t.batch is None else t.batch.steps_per_rollout
    return f"{count:g} rollouts x {per_rollout:g} optimizer steps per rollout"


def length(t: Translation, keys: Keys) -> None:
    """The end of training; a limit on steps goes before epochs."""
    steps = t.number(keys.steps)
    if steps is not None and steps > 0:
        t.converted(keys.steps, {"grpo.max_steps": t.steps(steps)}, rollouts(t, steps))
        t.inert(keys.epochs, f"{keys.steps} goes before it")
    else:
        t.same(keys.epochs, "grpo.num_train_epochs", note="the source drops the prompts that fill no rollout")
        t.inert(keys.steps, "not set: the epochs hold")


def saving(t: Translation, keys: Keys) -> None:
    """Checkpoints."""
    every, kept = t.number(keys.save) or -1, t.number(keys.keep) or -1
    if every > 0:
        t.converted(keys.save, {"grpo.save_strategy": "steps", "grpo.save_steps": t.steps(every)}, rollouts(t, every))
    else:
        t.converted(keys.save, {"grpo.save_strategy": "no"}, "no checkpoints")
    if kept > 0:
        t.same(keys.keep, "grpo.save_total_limit", kept)
    elif t.given(keys.keep):
        t.inert(keys.keep, "no limit")


def evaluates(t: Translation, keys: Keys) -> bool:
    """True if held-out data are looked at while training."""
    return (t.number(keys.val) or -1) > 0


def evaluation(t: Translation, keys: Keys, sampling: Mapping[str, tuple[str, Any]], group: tuple[str, int]) -> None:
    """Evaluation: how often, how many completions of a prompt (`group`: key and number), and by which sampling
    (`sampling`: name in `eval_sampling` -> key and value)."""
    sampled = {name: (key, value) for name, (key, value) in sampling.items() if value is not None}
    if not evaluates(t, keys):
        off = {keys.val: "no evaluation", group[0]: "nothing is evaluated"}
        off |= {key: "nothing is evaluated" for key, _ in sampling.values()}
        for key, note in off.items():
            if t.given(key):
                t.inert(key, note)
        if on(t.value(keys.val_first)):
            t.speed(keys.val_first, "one evaluation before training, which is left out: nothing else is evaluated")
        return
    every = t.number(keys.val)
    t.converted(keys.val, {"grpo.eval_strategy": "steps", "grpo.eval_steps": t.steps(every)}, rollouts(t, every))
    t.same(keys.val_first, "grpo.eval_on_start", on(t.value(keys.val_first)))
    micro = t.values["grpo.per_device_train_batch_size"]
    values = {"grpo.num_generations_eval": group[1]}
    t.set("grpo.per_device_eval_batch_size", group[1] * max(1, micro // group[1]), "whole groups")
    t.converted(group[0], values, "completions of a prompt in evaluation")
    for name, (key, value) in sampled.items():
        t.same(key, f"eval_sampling.{name}", value)


def naming(t: Translation, keys: Keys) -> None:
    """Name of the run, and where it is reported."""
    loggers = t.value(keys.logger)
    names = re.findall(r"\w+", loggers) if isinstance(loggers, str) else list(loggers or ())
    known = [name for name in names if name in REPORTS]
    lost = ", ".join(name for name in names if name not in REPORTS)
    note = f"{lost}: the terminal and the run folder's files are always written" if lost else ""
    t.converted(keys.logger, {"grpo.report_to": known or "none"}, note)
    if t.given(keys.run):
        name = str(t.value(keys.run))
        if "$" in name:
            t.speed(keys.run, "known only where the script runs; the file's name is the run's name")
        else:
            t.same(keys.run, "output.name", re.sub(r"[^\w.-]+", "-", name).strip("-."))


def adapter(t: Translation, keys: Keys, modules: Any) -> bool:
    """LoRA, where its rank is above 0; True if so. `modules` are the adapted ones, as PEFT has them."""
    if not t.number(keys.rank):
        for key in (keys.rank, keys.alpha, keys.adapted, keys.kept_out):
            if t.given(key):
                t.inert(key, "no LoRA: the rank is 0")
        return False
    t.same(keys.rank, "peft.r")
    t.same(keys.alpha, "peft.lora_alpha")
    tower = "; a vision tower's as well" if modules == "all-linear" and not on(t.value(keys.kept_out)) else ""
    t.same(keys.adapted, "peft.target_modules", modules, f"all linear layers{tower}" if tower else "")
    if on(t.value(keys.kept_out)):
        t.same(keys.kept_out, "peft.exclude_modules")
    return True


def weights(t: Translation, key: str, is_lora: bool) -> None:
    """Type of the trained weights: float32 with bfloat16 arithmetic unless the file says otherwise."""
    kind = str(t.value(key) or "fp32").lower()
    if kind in ("bf16", "bfloat16", "fp16", "float16"):
        name = "bfloat16" if "b" in kind else "float16"
        t.same(key, "model.dtype", name)
    elif is_lora:
        note = "frozen weights are rounded to bfloat16 for arithmetic either way; the adapter stays in float32"
        t.converted(key, {"model.dtype": "bfloat16"}, note)
    else:
        note = "updates of a small learning rate vanish in bfloat16 weights; 4 bytes for each weight"
        t.converted(key, {"model.dtype": "float32", "grpo.bf16": True}, note)


def engine(t: Translation, keys: Keys, memory: str) -> None:
    """vLLM in the training process, asleep while weights are trained."""
    t.set("grpo.use_vllm", True)
    t.set("vllm.mode", "colocate")
    t.same(memory, "vllm.gpu_memory_utilization", note="of the whole GPU, while the trainer's turn is over")
    wanted, ranks = int(t.number(keys.parallel)), t.world_size or 1
    fits = math.gcd(wanted, ranks)
    note = "" if fits == wanted else f"{ranks} training processes have no groups of {wanted}"
    t.speed(keys.parallel, note, {"vllm.tensor_parallel_size": fits})
    top_k = t.number(keys.top_k)
    t.same(
        keys.top_k,
        "grpo.top_k",
        0 if top_k is None or top_k < 0 else top_k,
        "-1 is 0 here: all tokens" if top_k == -1 else "",
    )


def prompts(t: Translation, keys: Keys) -> None:
    """Lengths, and what happens to prompts that are too long."""
    longest, completion = t.number(keys.longest_prompt), t.number(keys.longest_completion)
    t.same(keys.longest_completion, "grpo.max_completion_length")
    filters, cut = on(t.value(keys.filter_prompts)), str(t.value(keys.overflow))
    action = "filter" if filters else cut if cut in ("error", "left") else "error"
    t.same(keys.longest_prompt, "data.max_prompt_tokens", note="with the chat template and the tokens of images")
    if filters:
        t.same(keys.filter_prompts, "data.prompt_overflow", action)
        if t.given(keys.overflow):
            t.inert(keys.overflow, "prompts that are too long are filtered before")
    elif cut == action:
        t.same(keys.overflow, "data.prompt_overflow", action)
    else:
        t.changes(
            keys.overflow,
            {"data.prompt_overflow": action},
            f"no prompt is cut on the {cut} here: a longer one ends the run",
        )
    t.set("vllm.max_model_len", longest + completion, "longest prompt and completion together")


def files(t: Translation, keys: Keys, columns: Mapping[str, str], extra: Mapping[str, Any] | None = None) -> None:
    """Training files and held-out ones, each with the same columns; several are a mixture without weights, in which
    each row comes once per epoch."""
    train, held = _paths(t.value(keys.train_files)), _paths(t.value(keys.val_files))
    if not train:
        refuse(t, keys.train_files, "no training data")
    held = held if evaluates(t, keys) else []
    shared = {**({"columns": dict(columns)} if columns else {}), **(extra or {})}
    values: dict[str, Any] = {"data.path": train[0][0]}
    if len(train) > 1:
        parts = {name: {**_place(path), **shared} for name, path in _named(train).items()}
        for part, path in zip(parts.values(), held, strict=False):
            part |= {f"eval_{key}": value for key, value in _place(path).items()}
        values = {"data.path": "several files", "data.mix": parts}
    else:
        values = {f"data.{key}": value for key, value in {**_place(train[0]), **shared}.items()}
    t.converted(keys.train_files, values, f"{len(train)} files, each row once per epoch" if len(train) > 1 else "")
    if not evaluates(t, keys):
        if t.given(keys.val_files):
            t.inert(keys.val_files, "nothing is evaluated")
    elif len(train) > 1:
        note = f"each held out beside the training file of its place: {len(held)} files"
        (t.changes if len(held) > len(train) else t.converted)(keys.val_files, values, note)
    elif len(held) == 1:
        t.converted(keys.val_files, {f"data.eval_{key}": value for key, value in _place(held[0]).items()}, "")
    else:
        t.converted(keys.val_files, {"data.eval": {name: _place(path) for name, path in _named(held).items()}}, "")


def _paths(value: Any) -> list[tuple[str, str]]:
    """Path and split of each file of a setting: a text, or a list of them."""
    texts = re.split(r"\s*,\s*", value.strip("[] ")) if isinstance(value, str) else list(value or ())
    return [(path, split) for path, _, split in (str(text).strip("'\" ").partition("@") for text in texts) if path]


def _place(path: tuple[str, str]) -> dict[str, str]:
    return {"path": path[0], "split": path[1]} if path[1] else {"path": path[0]}


def _named(paths: list[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The files by names of their own: the folder before a name that all share."""
    stems = [PurePosixPath(path).stem for path, _ in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{PurePosixPath(path).parent.name}_{stem}"
        for stem, (path, _) in zip(stems, paths, strict=True)
    ]
    names = [re.sub(r"\W+", "_", name) or "part" for name in names]
    return {
        name if names.count(name) == 1 else f"{name}_{place}": path
        for place, (name, path) in enumerate(zip(names, paths, strict=True))
    }


def spread(completions: int) -> str:
    """Relative spread of the tokens of an optimizer step, for lengths whose deviation is their mean."""
    return f"{100 / math.sqrt(completions):.0f} % where completions are as uneven as they are long"
