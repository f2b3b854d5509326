"""`grpo.deepspeed`: DeepSpeed's own keys as a mapping or a JSON file, or the name of a ZeRO stage with good defaults.

A name (`zero2`, or `{name: zero2, ...}`) stands for what the pages of transformers and DeepSpeed advise; keys beside a
name, DeepSpeed's own, win over it. What is `auto` comes from the `grpo` section.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_autotune.config.sources import read_source
from grpo_autotune.errors import ConfigError, nearest_hint
from grpo_autotune.files import is_file

WHERE = "grpo.deepspeed"
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {
        "stage": 3,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""Name -> its keys of `zero_optimization`, beside those of all
(https://huggingface.co/docs/transformers/deepspeed, https://www.deepspeed.ai/docs/config-json/)."""

OF_ALL = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto"}
BESIDE: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}
ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Values of `grpo.optim` that DeepSpeed's Adam for the host equals; accelerate puts it in another's place too."""
TO_CPU = {"device": "cpu", "pin_memory": True}
MAPPINGS = (
    "bf16", "fp16", "optimizer", "optimizer.params", "scheduler", "scheduler.params",
    "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
)  # fmt: skip
"""Of DeepSpeed's keys those that transformers, accelerate and DeepSpeed look into."""


def deepspeed_keys(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration for a value of `grpo.deepspeed`; ConfigError for an unknown name or key beside one, a
    file that is not there or no JSON object, and a stage that is not the name's."""
    if isinstance(value, str):
        value = {"name": value} if value in ZERO or not _is_place(value) else _read(Path(value).expanduser())
    given = dict(value)
    name, offload = given.pop("name", None), given.pop("offload", None)
    if name is not None:
        if not isinstance(name, str) or name not in ZERO:
            fix = nearest_hint(str(name), ZERO, f"Names: {', '.join(ZERO)}; or give a JSON file.")
            raise ConfigError(f"there is no {name}", where=WHERE, fix=fix)
        given = _over({**BESIDE, "zero_optimization": {**OF_ALL, **ZERO[name], **_offloaded(name, offload)}}, given)
    elif offload is not None:
        raise ConfigError("goes with a name", where=f"{WHERE}.offload", fix=f"Names: {', '.join(ZERO)}.")
    zero = given.get("zero_optimization")
    if not isinstance(zero, Mapping):
        fix = f"Write it as DeepSpeed has it, or a name: {', '.join(ZERO)}."
        raise ConfigError("no mapping, and without it nothing is sharded", where=f"{WHERE}.zero_optimization", fix=fix)
    for key in MAPPINGS:
        part: Any = given
        for level in key.split("."):
            part = part.get(level) if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping | None):
            fix = "Write it as DeepSpeed has it: deepspeed.ai/docs/config-json."
            raise ConfigError(f"{part!r} is no mapping", where=f"{WHERE}.{key}", fix=fix)
    if name is not None and zero["stage"] != ZERO[name]["stage"]:
        stage = f"{WHERE}.zero_optimization.stage"
        raise ConfigError(f"{name} is stage {ZERO[name]['stage']}", where=stage, fix="Remove this key, or the name.")
    return given


def with_deepspeed_file(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Plain values of a configuration, with the content of the JSON file that `grpo.deepspeed` names: what a run stores
    needs no such file. Its path starts from `folder`, the configuration's, or else from the current one."""
    grpo = values.get("grpo")
    named = grpo.get("deepspeed") if isinstance(grpo, Mapping) else None
    if not isinstance(grpo, Mapping) or not isinstance(named, str) or named in ZERO or not _is_place(named):
        return values
    beside = folder / Path(named).expanduser()
    return {**values, "grpo": {**grpo, "deepspeed": _read(beside if is_file(beside) else Path(named).expanduser())}}


def _is_place(text: str) -> bool:
    return "/" in text or "." in text or is_file(text)


def _read(place: Path) -> dict[str, Any]:
    if not is_file(place):
        raise ConfigError(f"there is no file {place}", where=WHERE, fix=f"Give a JSON file, or {', '.join(ZERO)}.")
    try:
        values = json.loads(read_source(place))
    except ValueError as error:
        raise ConfigError(f"{place} is no JSON: {error}", where=WHERE) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place} holds no JSON object", where=WHERE, fix="See deepspeed.ai/docs/config-json.")
    return values


def _offloaded(name: str, offload: Any) -> dict[str, Any]:
    if offload in (None, "none"):
        return {}
    if offload != "cpu":
        fix = "Write cpu, or DeepSpeed's own keys."
        raise ConfigError(f"{offload} is not offered", where=f"{WHERE}.offload", fix=fix)
    return {"offload_optimizer": TO_CPU, **({"offload_param": TO_CPU} if name == "zero3" else {})}


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings of both, the values of `above` first."""
    both = {key for key in above if isinstance(above[key], Mapping) and isinstance(below.get(key), Mapping)}
    return {**below, **above, **{key: _over(below[key], above[key]) for key in both}}
