"""Reward functions of a configuration in their source text, which is read and not imported: names and arguments."""

from __future__ import annotations

import ast
import inspect

from grpo_autotune.config.foreign_keys import ForeignKey, accepted_types, check_values
from grpo_autotune.config.reward_arguments import NAMED, check_arguments
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.registry import Definition, is_reference, source_of


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
        columns = () if is_ours else None
        check_arguments(_signature(definition), item.params, where, columns, made=definition.name == "__init__")
        if is_ours:
            check_values(f"{where}.params", item.params, _keys(definition))


def _signature(definition: Definition) -> inspect.Signature:
    """The signature of a definition in source text; a default is its expression."""
    args = definition.args
    positional = [*args.posonlyargs, *args.args][definition.name == "__init__" :]
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
