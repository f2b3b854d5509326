"""ms-swift: `swift rlhf`, `megatron rlhf` and Ray's YAML, with `rlhf_type: grpo`.

Its batches count completions. `steps_per_generation` counts micro steps in `swift rlhf`, and global batches in Megatron
and Ray (docs/source_en/Megatron-SWIFT/GRPO.md).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grpo_autotune.config.foreign_keys import grpo_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.frameworks import sharding, swift_keys, swift_run
from grpo_autotune.interop.reading.arguments import option_value
from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import UNKNOWN, SixNumbers, Translation

_ZERO_3: dict[str, Any] = {"stage3_prefetch_bucket_size": 0, "stage3_gather_16bit_weights_on_model_save": True}
PRESETS = {  # DeepSpeed's configurations by swift's names (swift/config; prefetch: swift/rlhf_trainers/arguments.py)
    **{f"zero{stage}": sharding.zero(stage) for stage in (0, 1, 2)},
    "zero2_offload": sharding.zero(2, optimizer="cpu"),
    "zero3": sharding.zero(3, **_ZERO_3),
    "zero3_offload": sharding.zero(3, optimizer="cpu", parameters="cpu", **_ZERO_3),
}
FSDP_2 = {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}
OVERRULED = "overruled."  # beginning of keys that are given under another name as well, which wins


def translate(source: Source, version: str | None, world_size: int | None) -> Translation:
    """Verdicts of all of ms-swift's settings. ConfigError for a way of training that is not read."""
    source, names = prepared(source)
    megatron = "megatron" in (source.program or "") or "global_batch_size" in source.settings
    version, reason = _version(source, names, version)
    defaults = dict(swift_keys.DEFAULTS)
    for before, values in swift_keys.OLDER:
        defaults |= values if _before(version, before) else {}
    defaults |= swift_keys.MEGATRON if megatron else {}
    to = Translation(source, defaults, version, reason, world_size)
    _refuse(to)
    _batch(to, megatron, version)
    swift_run.translate(to)
    _sharding(to, megatron)
    for key in [key for key in source.settings if key not in to.rows]:
        _rest(to, key)
    to.rows = {key: row.model_copy(update={"key": names.get(key, key)}) for key, row in to.rows.items()}
    return to


def prepared(source: Source) -> tuple[Source, dict[str, str]]:
    """The source under the newest names, with the files that it names, and the newest name of a setting -> its own."""
    source = sharding.with_file(source, source.settings.get("deepspeed"), sharding.PREFIX)
    source = sharding.with_launch(source)
    variables = {key: one for key, one in source.environment.items() if key in swift_keys.ENVIRONMENT}
    given = {key: replace(one, value=option_value(str(one.value))) for key, one in variables.items()}
    for key, setting in source.settings.items():
        inside = swift_run.mapping(setting.value) if key in (*swift_keys.GROUPS, *swift_keys.VARIABLES) else {}
        parts = {f"{key}.{name}": replace(setting, value=value) for name, value in inside.items()}
        given |= parts or {key: setting}
    settings: dict[str, Setting] = {}
    names: dict[str, str] = {}
    for path in sorted(given, key=lambda path: _newest(path) != path):  # swift reads `max_new_tokens` first
        name = _newest(path)
        if name in settings:
            settings[OVERRULED + names[name]], names[OVERRULED + names[name]] = settings[name], names[name]
        settings[name], names[name] = given[path], path
    return replace(source, settings=settings), names


def _newest(path: str) -> str:
    """The newest name of a setting, for its name in the file, with the mapping that it lies in before it."""
    group, _, inner = path.partition(".")
    is_variable = group in swift_keys.VARIABLES and inner.upper() in swift_keys.ENVIRONMENT
    name = inner if group in swift_keys.GROUPS[:2] and inner not in ("", "gpus") else path
    return inner.upper() if is_variable else swift_keys.RENAMED.get(name, name)


def _version(source: Source, names: Mapping[str, str], wanted: str | None) -> tuple[str, str]:
    if version := wanted or source.hints.get("ms-swift"):
        return version, "--source-version" if wanted else "pinned in the file"
    old = next((key for key in swift_keys.VERSION_OF if key in names.values()), None)
    return (swift_keys.VERSION_OF[old], f"the last that knows {old}") if old else (swift_keys.NEWEST, "assumed")


def _before(version: str, other: str) -> bool:
    first, second = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (version, other))
    if not first:
        raise ConfigError(f"{version!r} is no version", where="--source-version", fix="Example: 3.8.")
    return first < second


def _refuse(to: Translation) -> None:
    fix = "Import a configuration without it."
    for key, what in swift_keys.REFUSED.items():
        if to.given(key) and to.value(key):
            raise ConfigError(f"{what}: this is not read", where=to.where(key), fix=fix)
    for key, legal in swift_keys.READ.items():
        if to.value(key, "dpo") not in legal:
            what = f"{to.value(key, 'dpo')} is not GRPO as TRL has it"
            raise ConfigError(what, where=to.where(key), fix=f"Read here: {', '.join(legal)}.")
    if not to.value("reward_funcs"):
        what = "no reward function: an environment or a teacher scores, and that is not read"
        raise ConfigError(what, where=to.where("reward_funcs"), fix=fix)


def _batch(to: Translation, megatron: bool, version: str) -> None:
    """The six numbers, by swift's arithmetic or Megatron's; ConfigError where it would stop as well."""
    world, keys = _processes(to)
    group, passes = to.number("num_generations"), to.number("num_iterations")
    if megatron:
        split = [f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context")]
        shared, micro = math.prod(map(to.number, split)), to.number("micro_batch_size")
        completions = to.number("global_batch_size")
        rollout = completions * to.number("steps_per_generation")
        keys += ["global_batch_size", "micro_batch_size", *split]
        note = "steps_per_generation counts global batches"
    else:
        shared, micro = to.number("sequence_parallel_size"), to.number("per_device_train_batch_size")
        early = _before(version, "3.4")
        sleeps = early and to.value("use_vllm") and to.number("sleep_level") and not to.value("async_generate")
        steps = 1 if sleeps else to.number("gradient_accumulation_steps") or max(1, math.ceil(16 / micro / world))
        completions = micro * world * steps
        rollout = micro * world * (to.number("steps_per_generation") or (1 if early else steps))
        keys += ["per_device_train_batch_size", "gradient_accumulation_steps", "sequence_parallel_size"]
        note = f"{micro} x {world} processes x {steps}{', as it has to be with sleep_level' if sleeps else ''}"
    rollout = to.number("generation_batch_size") or rollout
    for count, parts, what, key in (
        (world, shared, "processes", keys[-1]),
        (rollout, group, "completions of a rollout", "num_generations"),
    ):
        if parts < 1 or count % parts:
            fix = "swift refuses it, too. The number of processes is NPROC_PER_NODE (--env)."
            raise ConfigError(f"{count} {what} are not whole groups of {parts}", where=to.where(key), fix=fix)
    six = SixNumbers(group, rollout // group, completions, passes, world // shared, micro)
    keys += ["num_generations", "steps_per_generation", "generation_batch_size", "num_iterations"]
    to.set_batch(six, [key for key in keys if to.given(key)] or keys[:1], note)


def _processes(to: Translation) -> tuple[int, list[str]]:
    """Processes that train, and the settings that say so: Ray's, the launcher's, else swift's own variables."""
    counts = [key for key in ("NPROC_PER_NODE", "NNODES") if to.given(key)]
    launched = to.number("train.gpus") if to.given("train.gpus") else sharding.processes(to)
    if to.given("CUDA_VISIBLE_DEVICES"):
        spread = not counts and launched is None and "," in str(to.value("CUDA_VISIBLE_DEVICES"))
        to.speed("CUDA_VISIBLE_DEVICES", "one process, the model spread over them" if spread else "GPUs of the run")
    if launched is None:
        return math.prod(map(to.number, counts)), counts
    to.inert(counts, "the launcher says it")
    return launched, ["train.gpus"] if to.given("train.gpus") else []


def _sharding(to: Translation, megatron: bool) -> None:
    adapter = to.value("tuner_type") != "full"
    if named := to.value("deepspeed"):
        sharding.apply_deepspeed(to, "deepspeed", PRESETS.get(str(named), named), adapter=adapter)
    if to.value("fsdp"):
        sharding.fully_sharded(to, "fsdp", FSDP_2)
    sharding.apply_launch(to, adapter=adapter)
    if megatron and not adapter:
        note = "Megatron keeps 32-bit weights beside the bfloat16 ones"
        to.converted("use_distributed_optimizer", sharding.master_weights(to), note)
    if "torch_dtype" in to.rows and to.values["model.dtype"] != to.value("torch_dtype"):
        note = "the type of computing: weights are kept in 32 bits"
        to.converted("torch_dtype", sharding.master_weights(to), note)


def _rest(to: Translation, key: str) -> None:
    value, known = to.value(key), swift_keys.verdict_of(key)
    foreign = None if known else grpo_keys().get(key)
    if foreign is not None and foreign.allows(value) and not key.startswith("vllm_"):
        to.same(key, f"grpo.{key}")
    elif key.startswith(OVERRULED):
        to.inert(key, "another name of it wins")
    elif value in (None, False, [], ""):
        to.inert(key, "off")
    else:
        verdict, note = known or ("none", UNKNOWN)
        to.verdict(verdict, key, {}, note)
