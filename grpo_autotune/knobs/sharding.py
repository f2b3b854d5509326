"""Knobs of `grpo.deepspeed`: the stage of ZeRO, and what of a training lies in the host's memory.

They change where numbers are kept and who sends them, and nothing that is computed: exact, to rounding.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.zero import ZERO, deepspeed_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs.context import KnobContext

SECTION = "grpo.deepspeed"
STAGE = f"{SECTION}.zero_optimization.stage"
OFFLOAD_OPTIMIZER = f"{SECTION}.zero_optimization.offload_optimizer.device"
OFFLOAD_PARAMETERS = f"{SECTION}.zero_optimization.offload_param.device"
ZERO_KNOBS = (STAGE, OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS)
STAGES = (1, 2, 3)


def current(key: str, config: RunConfig) -> Any:
    """The user's own value, DeepSpeed's default where it is left out; None without `grpo.deepspeed`."""
    asked = config.grpo.get("deepspeed")
    if not asked:
        return None
    value: Any = deepspeed_keys(asked)
    for name in key.removeprefix(f"{SECTION}.").split("."):
        value = (value or {}).get(name)
    return value or (0 if key == STAGE else "none")


def stages(context: KnobContext, own: int | None) -> tuple[int, ...]:
    """The three stages, the user's own first, where several ranks train by DeepSpeed."""
    return (own, *(n for n in STAGES if n != own)) if own and context.config.batch.processes > 1 else ()


def devices(context: KnobContext, own: str | None) -> tuple[str, ...]:
    """The GPU and the host, the user's own first, where a GPU trains by DeepSpeed."""
    return (own, "none" if own == "cpu" else "cpu") if own is not None and context.gpus else ()


def stage_rule(context: KnobContext, value: Any) -> str | None:
    """Parameters are shared in stage 3, which packed weights cannot be."""
    config = context.config
    if value not in STAGES:
        return f"{STAGE} {value} is none of 1, 2 and 3"
    if value == 3 and config.model.load_in_4bit:
        return f"{STAGE} 3 shares no weights in 4 bits (model.load_in_4bit)"
    if value < 3 and current(OFFLOAD_PARAMETERS, config) != "none":
        return f"{OFFLOAD_PARAMETERS} {current(OFFLOAD_PARAMETERS, config)} needs stage 3"
    return None


def device_rule(context: KnobContext, value: Any, *, key: str) -> str | None:
    """There is a host beside a GPU; parameters are on neither in whole before stage 3."""
    if value == "cpu" and context.gpus == 0:
        return f"{key} cpu saves nothing without a GPU"
    if key == OFFLOAD_PARAMETERS and value != "none" and current(STAGE, context.config) != 3:
        return f"{key} {value} needs stage 3"
    return None


RULES = {STAGE: stage_rule} | {key: partial(device_rule, key=key) for key in ZERO_KNOBS[1:]}


def turned(asked: str | Mapping[str, Any] | None, key: str, value: Any) -> str | dict[str, Any]:
    """`grpo.deepspeed` with a knob at another value: the name of a stage stays a name, whatever else is written out.
    Raises `ConfigError` where there is none to turn."""
    if not asked:
        raise ConfigError("there is no grpo.deepspeed", where=key, fix="Leave this knob out.")
    if isinstance(asked, str) and asked in ZERO and key == STAGE:
        return f"zero{value}"
    keys = copy.deepcopy(deepspeed_keys(asked))
    at, *rest = key.removeprefix(f"{SECTION}.zero_optimization.").split(".")
    zero = keys["zero_optimization"]
    zero[at] = {**(zero.get(at) or {}), rest[0]: value} if rest else value
    keys["zero_optimization"] = {**ZERO.get(f"zero{zero['stage']}", {}), **zero}
    return keys
