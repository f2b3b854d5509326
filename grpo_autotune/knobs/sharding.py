"""Knobs of `grpo.deepspeed`: the stage of ZeRO, and what of a training lies in the host's memory.

They change where numbers are kept and who sends them, and nothing that is computed: exact, to rounding.
"""

import copy
from typing import Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.zero import ADAMW, ZERO, deepspeed_keys
from grpo_autotune.errors import ConfigError
from grpo_autotune.knobs.context import KnobContext

SECTION = "grpo.deepspeed.zero_optimization."
STAGE = f"{SECTION}stage"
OFFLOAD_OPTIMIZER, OFFLOAD_PARAMETERS = f"{SECTION}offload_optimizer.device", f"{SECTION}offload_param.device"
ZERO_KNOBS = {
    STAGE: "a higher stage keeps less on each rank; in stage 3 parameters are sent before every pass over them",
    OFFLOAD_OPTIMIZER: "the optimizer's state is kept and updated on the host; gradients go there, and weights back",
    OFFLOAD_PARAMETERS: "parameters are kept on the host, and go to the GPU before every pass over them",
}
"""Key -> why it matters."""


def zero_value(key: str, config: RunConfig) -> Any:
    """The user's own value, DeepSpeed's default where it is left out; None without `grpo.deepspeed`."""
    asked = config.grpo.get("deepspeed")
    value: Any = deepspeed_keys(asked)["zero_optimization"] if asked else None
    for name in key.removeprefix(SECTION).split(".") if asked else ():
        value = (value or {}).get(name)
    return value if value or not asked else 0 if key == STAGE else "none"


def zero_values(key: str, context: KnobContext, own: Any) -> tuple[Any, ...]:
    """The user's own, and the other stages where there are several ranks, or the other device beside a GPU."""
    usable = context.config.batch.processes > 1 if key == STAGE else context.gpus
    usable = usable and (key != OFFLOAD_OPTIMIZER or str(context.config.grpo.get("optim") or ADAMW[0]) in ADAMW)
    others = (1, 2, 3) if key == STAGE else ("none", "cpu")
    return (own, *(value for value in others if value != own)) if own is not None and usable else ()


def zero_rule(key: str, context: KnobContext, value: Any) -> str | None:
    """A stage is 1, 2 or 3; parameters are shared in stage 3 alone."""
    config = context.config
    if key == STAGE and value not in (1, 2, 3):
        return f"{key} {value} is none of 1, 2 and 3"
    if value == "cpu" and not context.gpus:
        return f"{key} cpu saves nothing without a GPU"
    if not zero_value(STAGE, config) and zero_value(OFFLOAD_OPTIMIZER, config) not in (None, "none"):
        return f"{OFFLOAD_OPTIMIZER} needs a stage from 1 on"
    if zero_value(STAGE, config) != 3 and zero_value(OFFLOAD_PARAMETERS, config) not in (None, "none"):
        return f"{OFFLOAD_PARAMETERS} needs stage 3"
    return None


def turned(asked: Any, key: str, value: Any) -> Any:
    """`grpo.deepspeed` with a knob at another value: a stage's name stays a name, anything else is written out.
    Raises `ConfigError` where there is none."""
    if not asked:
        raise ConfigError("there is no grpo.deepspeed", where=key, fix="Leave this knob out.")
    if key == STAGE and isinstance(asked, str) and {asked, f"zero{value}"} <= ZERO.keys():
        return f"zero{value}"
    keys = copy.deepcopy(deepspeed_keys(asked))
    name, *below = key.removeprefix(SECTION).split(".")
    zero = keys["zero_optimization"]
    zero[name] = {**(zero.get(name) or {}), below[0]: value} if below else value
    keys["zero_optimization"] = {**ZERO.get(f"zero{zero['stage']}", {}), **zero}
    return keys
