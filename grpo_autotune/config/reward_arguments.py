"""Arguments of reward functions against their signatures: those that a configuration gives, and those that TRL does."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from grpo_autotune.errors import ConfigError, nearest_hint

ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
GIVEN_BY_TRL = frozenset({*ALWAYS_GIVEN, "environments"})
"""Keywords of a reward beside the data's columns (`GRPOTrainer._calculate_rewards`, TRL 1.16)."""

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_arguments(
    signature: inspect.Signature,
    params: Mapping[str, Any],
    where: str,
    columns: Collection[str] | None = None,
    *,
    made: bool = False,
) -> None:
    """Check that the reward function at the key path `where` takes what it will be given, and is given what it needs;
    ConfigError where not. `**kwargs` in its signature is for columns, and would hide a misspelt parameter. Columns of
    None are not known yet. If it is `made` first, the signature is a class's, which takes `params` alone."""
    parameters = {name: parameter for name, parameter in signature.parameters.items() if parameter.kind in NAMED}
    settable = [name for name in parameters if name not in GIVEN_BY_TRL]
    for name in params:
        if name not in settable:
            hint = nearest_hint(name, settable, f"Parameters: {', '.join(settable) or 'none'}.")
            raise ConfigError("the function has no such parameter", where=f"{where}.params.{name}", fix=hint)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    refused = [name for name in (*ALWAYS_GIVEN, *(columns or ())) if name not in parameters]
    if refused and not made and inspect.Parameter.VAR_KEYWORD not in kinds:
        what = f"the function takes no {' and no '.join(refused[:2])}, which TRL gives to every reward"
        raise ConfigError(what, where=where, fix="Add **kwargs to its parameters.")
    missing = [name for name in settable if parameters[name].default is inspect.Parameter.empty and name not in params]
    missing = [name for name in missing if columns is not None and name not in columns]
    if missing:
        wanted = ", ".join(f"{name}: ..." for name in missing)
        column = f" Columns of the data: {', '.join(columns)}." if columns else ""
        fix = f"Write params: {{{wanted}}}.{column}"
        raise ConfigError(f"the function needs {' and '.join(missing)}", where=where, fix=fix)
