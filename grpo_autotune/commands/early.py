"""Checks of a configuration that need no library: its mistakes are said before torch is imported. Reward functions
are read in their source text."""

import inspect
import shlex
from collections.abc import Mapping
from typing import Any

from grpo_autotune.config.foreign_keys import ForeignKey, accepted_types, check_values
from grpo_autotune.config.packages import check_packages
from grpo_autotune.config.places import check_data_place, check_model_place, check_split
from grpo_autotune.config.reward_arguments import NAMED, check_arguments
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections import judge
from grpo_autotune.errors import AutotuneError, ConfigError
from grpo_autotune.estimate.architectures import architecture
from grpo_autotune.knobs.table import check_keys
from grpo_autotune.registry import Definition, is_reference, source_of
from grpo_autotune.scripts.stand_in import load_stand_in
from grpo_autotune.speedups.selection import chosen


def check_early(config: RunConfig, overrides: Mapping[str, Any]) -> None:
    """Refuse a speed-up, a knob, a reward or its parameter, a file, a split or a model that does not exist, an empty
    file of data, and keys whose package is not installed; `overrides` are `GRPOConfig` keys that the command puts in
    place of the configuration's."""
    for name in filter(is_reference, chosen(config.speedups)):
        source_of("speedup", name)
    check_keys(config.search)
    check_inputs(config)
    check_packages(config, overrides)


def check_inputs(config: RunConfig) -> None:
    """Refuse a reward or its parameter, a file, a split or a model that does not exist, and an empty file of data."""
    check_rewards(config)
    _check_data(config)
    check_model(config)


def check_model(config: RunConfig) -> None:
    """Refuse a model whose folder, function or architecture is not there."""
    name = str(config.model.name_or_path)
    if config.model.random_init is not None:
        architecture(config.model.random_init)
    elif is_reference(name):
        source_of("model", name)
    else:
        check_model_place(name)


def _check_data(config: RunConfig) -> None:
    for place, one in config.data.sources.items():
        key = f"{place}.path"
        check_data_place(one.path, name=one.name, revision=one.revision, params=one.params, where=key)
        check_split(one.path, one.split, f"{place}.split")
        for name, held_out in one.held_out.items():
            key = f"{place}.eval.{name}." if name else f"{place}.eval_"
            if held_out.path is not None:
                check_data_place(held_out.path, name=None, revision=None, params=None, where=f"{key}path")
            check_split(held_out.path or one.path, held_out.split, f"{key}split")


def load_script(config: str | None, script: str, overrides: list[str] | None) -> tuple[RunConfig, list[str]]:
    """The configuration that stands in for a script, and its arguments; only `search` and `output` can be set."""
    words = shlex.split(script)
    if config is not None:
        raise ConfigError("a script takes the place of a configuration", where="--script", fix="Give one of the two.")
    return load_stand_in(words, overrides or []), words


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
        judge.check_keys(judge.judge_settings(params))
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
