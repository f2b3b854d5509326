"""Arguments of reward functions against their signatures: those of a configuration, and those that TRL gives."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from grpo_autotune.config.foreign_keys import ForeignKey, accepted_types, check_values
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, nearest_hint
from grpo_autotune.registry import Definition, is_reference, source_of

ALWAYS_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
GIVEN_BY_TRL = frozenset({*ALWAYS_GIVEN, "environments"})
"""Keywords of a reward beside the data's columns (`GRPOTrainer._calculate_rewards`, TRL 1.16)."""

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_rewards(config: RunConfig) -> None:
    """Check names and parameters of the rewards in their source text: nothing is imported.

    Raises:
        ConfigError: There is no such function, or it does not take what it will be given.
    """
    for place, item in enumerate(config.rewards):
        definition, where = source_of("reward", item.name), f"rewards[{place}]"
        if definition is None:
            continue
        is_ours = not is_reference(item.name)
        # of ours, a parameter without a default is a setting and never a column
        check_arguments(_signature(definition), item.params, where, columns=() if is_ours else None)
        if is_ours:
            check_values(f"{where}.params", item.params, _keys(definition))


def check_arguments(
    signature: inspect.Signature, params: Mapping[str, Any], where: str, columns: Collection[str] | None = None
) -> None:
    """Check that a reward function takes what it will be given, and is given what it needs.

    Args:
        signature: Of the function.
        params: Its `rewards[].params`; `**kwargs` is for columns, and would hide a misspelt name.
        where: Key path of the reward.
        columns: Columns of the data; None where they are not known yet.

    Raises:
        ConfigError: It does not, or is not.
    """
    parameters = {name: parameter for name, parameter in signature.parameters.items() if parameter.kind in NAMED}
    settable = [name for name in parameters if name not in GIVEN_BY_TRL]
    for name in params:
        if name not in settable:
            hint = nearest_hint(name, settable, f"Parameters: {', '.join(settable) or 'none'}.")
            raise ConfigError("the function has no such parameter", where=f"{where}.params.{name}", fix=hint)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    refused = [name for name in (*ALWAYS_GIVEN, *(columns or ())) if name not in parameters]
    if refused and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ConfigError(
            f"the function takes no {' and no '.join(refused[:2])}, which TRL gives to every reward",
            where=where,
            fix="Add **kwargs to its parameters.",
        )
    missing = [name for name in settable if parameters[name].default is inspect.Parameter.empty and name not in params]
    missing = [name for name in missing if columns is not None and name not in columns]
    if missing:
        wanted = ", ".join(f"{name}: ..." for name in missing)
        column = f" Columns of the data: {', '.join(columns)}." if columns else ""
        raise ConfigError(
            f"the function needs {' and '.join(missing)}", where=where, fix=f"Write params: {{{wanted}}}.{column}"
        )


def _signature(definition: Definition) -> inspect.Signature:
    """The signature of a definition in source text; a default is its expression."""
    args = definition.args
    positional = [*args.posonlyargs, *args.args]
    defaults = dict(zip(reversed(positional), reversed(args.defaults), strict=False))
    defaults |= {arg: value for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value is not None}
    empty, named, keyword = inspect.Parameter.empty, *NAMED
    parameters = [inspect.Parameter(arg.arg, named, default=defaults.get(arg, empty)) for arg in positional]
    parameters += [inspect.Parameter(arg.arg, keyword, default=defaults.get(arg, empty)) for arg in args.kwonlyargs]
    if args.kwarg is not None:
        parameters.append(inspect.Parameter(args.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters, __validate_parameters__=False)


def _keys(definition: Definition) -> dict[str, ForeignKey]:
    """Parameters as keys with the types of their annotations."""
    annotated: list[tuple[str, ast.expr]] = [
        (arg.arg, arg.annotation) for arg in definition.args.kwonlyargs if arg.annotation is not None
    ]
    return {name: ForeignKey(name, accepted_types(annotation), None) for name, annotation in annotated}
