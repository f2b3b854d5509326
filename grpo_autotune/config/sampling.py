"""Sampling settings against what will sample: transformers' `generate`, or vLLM with `grpo.use_vllm`.

Ranges are those that both accept (transformers/generation/logits_process.py; `SamplingParams._verify_args` in
vllm/sampling_params.py) and that still sample: `top_p: 0` is greedy in transformers without a word. TRL hands
`generation_kwargs` to `GenerationConfig`, which takes any name in silence, or to `SamplingParams`.
"""

import ast
import importlib.util
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from grpo_autotune.config.foreign_keys import class_in_source, sampling_keys
from grpo_autotune.errors import ConfigError, nearest


class Range(NamedTuple):
    """Legal values of a sampling key."""

    least: float  # smallest legal value
    most: float  # largest legal value
    remark: str  # value or reason that a reader may look for
    is_open: bool = False  # True if every number above 0 is legal, `least` being one that makes sense


RANGES = {
    "temperature": Range(0.01, math.inf, "completions of a group must differ", is_open=True),
    "top_p": Range(0.01, 1.0, "1.0 takes every token", is_open=True),
    "top_k": Range(0, math.inf, "0 takes every token"),
    "min_p": Range(0.0, 1.0, "0 takes every token"),
    "repetition_penalty": Range(0.01, math.inf, "1.0 changes nothing", is_open=True),
}

ENGINE_RANGES = RANGES | {
    "temperature": Range(0.01, 2.0, "vLLM samples at 0.01 what is below"),
    "top_k": Range(-1, math.inf, "0 takes every token"),
}
"""The same with vLLM."""

UNUSABLE = {
    "stop_strings": "TRL gives `generate` no tokenizer to look for them. With grpo.use_vllm the key is stop.",
    "token_healing": "TRL gives `generate` no tokenizer for it.",
    "return_dict_in_generate": "TRL takes the tokens alone.",
    "disable_compile": "TRL gives it to `GenerationConfig` itself.",
    "num_return_sequences": "Use grpo.num_generations.",
    "n": "Use grpo.num_generations.",
    "max_new_tokens": "Use grpo.max_completion_length.",
    "max_tokens": "Use grpo.max_completion_length.",
    "temperature": "Use grpo.temperature, which the training pass divides by as well.",
}
"""Keys of `generation_kwargs` that break TRL's step or contradict it, and the reason or what to do."""


def check_sampling(grpo: Mapping[str, Any]) -> None:
    """ConfigError where a sampling key of a `grpo` section, whose types were checked, is out of range, or a key of its
    `generation_kwargs` is unknown or cannot be used."""
    in_vllm = bool(grpo.get("use_vllm"))
    given = grpo.get("generation_kwargs")
    further = given if isinstance(given, Mapping) else {}  # TRL also takes it as JSON text
    for prefix, values in (("grpo", grpo), ("grpo.generation_kwargs", further)):
        for name, legal in (ENGINE_RANGES if in_vllm else RANGES).items():
            _check_range(f"{prefix}.{name}", values.get(name), legal)
    for name, value in further.items():
        _check_setting(name, value, in_vllm=in_vllm)


def check_eval_sampling(values: Mapping[str, Any], *, evaluates: bool, in_vllm: bool, server_n: int) -> None:
    """ConfigError where a value of an `eval_sampling` section is out of range, nothing is evaluated, or a server would
    be asked for `server_n` greedy completions of a prompt."""
    if not evaluates:
        fix = "Set grpo.eval_strategy, and data.eval_split, data.eval_path or data.eval."
        raise ConfigError("nothing is evaluated", where="eval_sampling", fix=fix)
    legal = ENGINE_RANGES if in_vllm else RANGES
    legal = legal | {"temperature": legal["temperature"]._replace(least=0, remark="0 is greedy", is_open=False)}
    for name, value in values.items():
        _check_range(f"eval_sampling.{name}", value, legal[name])
    if values["temperature"] == 0 and server_n > 1:
        what = f"a vLLM server gives one greedy completion of a prompt, and {server_n} are asked for"
        raise ConfigError(what, where="eval_sampling.temperature", fix="Set grpo.num_generations_eval to 1.")


def _check_range(where: str, value: Any, legal: Range) -> None:
    if not isinstance(value, int | float):
        return
    above = value > 0 if legal.is_open else value >= legal.least
    if not (above and value <= legal.most and value != math.inf):
        lower = "above 0" if legal.is_open else f"at least {legal.least:g}"
        accepted = lower if math.isinf(legal.most) else f"{lower} and at most {legal.most:g}"
        closest = legal.most if value > legal.most else legal.least
        fix = f"Nearest legal: {closest:g} ({legal.remark})."
        raise ConfigError(f"must be {accepted}, and is {value}", where=where, fix=fix)


def _check_setting(name: str, value: Any, *, in_vllm: bool) -> None:
    where = f"grpo.generation_kwargs.{name}"
    if name in UNUSABLE:
        raise ConfigError("this setting cannot be used here", where=where, fix=UNUSABLE[name])
    if name == "do_sample" and value is not True:
        raise ConfigError("all completions of a group would be the same", where=where, fix="Remove it.")
    names = _engine_names() if in_vllm else _generate_names()
    if names and name not in names:
        near = nearest(name, names, cutoff=0.8)
        library = "vLLM's SamplingParams" if in_vllm else "transformers' GenerationConfig"
        fix = f"Nearest: {near}." if near else "Remove it."
        raise ConfigError(f"{library} has no such setting", where=where, fix=fix)


@lru_cache(maxsize=1)
def _generate_names() -> frozenset[str]:
    """Settings that `GenerationConfig.__init__` takes out of its keywords, as installed."""
    source = class_in_source("transformers", "generation/configuration_utils.py", "GenerationConfig")
    methods = (entry for entry in source.body if isinstance(entry, ast.FunctionDef) and entry.name == "__init__")
    calls = (node for method in methods for node in ast.walk(method) if isinstance(node, ast.Call))
    popped = (call.args[0] for call in calls if ast.unparse(call.func) == "kwargs.pop")
    names = {name.value for name in popped if isinstance(name, ast.Constant)}
    return frozenset(str(name) for name in names if not str(name).startswith("_"))


@lru_cache(maxsize=1)
def _engine_names() -> frozenset[str]:
    """Settings of vLLM's `SamplingParams`, as installed; empty without it."""
    return frozenset(sampling_keys()) if importlib.util.find_spec("vllm") is not None else frozenset()
