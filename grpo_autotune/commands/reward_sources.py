"""Reward functions of a configuration in their source text, which is read and not imported: names and arguments."""

import inspect
from collections.abc import Mapping
from typing import Any

from grpo_autotune.config.foreign_keys import ForeignKey, accepted_types, check_values
from grpo_autotune.config.reward_arguments import NAMED, check_arguments
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.judge import check_keys, judge_settings
from grpo_autotune.errors import AutotuneError
from grpo_autotune.registry import Definition, is_reference, source_of


def check_rewards(config: RunConfig) -> None:
    """Refuse a reward that does not exist, does not take what it is given, or misses the key of a judge's provider;
    nothing is imported."""
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
        if item.name == "judge":
            _check_judge(item.params, f"{where}.params")


def _check_judge(params: Mapping[str, Any], where: str) -> None:
    try:
        check_keys(judge_settings(params))
    except AutotuneError as error:
        raise type(error)(error.what, where=f"{where}.{error.where}", fix=error.fix) from None


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
    return {
        arg.arg: ForeignKey(arg.arg, accepted_types(arg.annotation), None)
        for arg in definition.args.kwonlyargs
        if arg.annotation is not None
    }
