"""Rewards of other frameworks as items of `rewards`: those that open-r1 and ms-swift know by name, and functions of the
user's, in a module that is written beside a configuration and names them to TRL."""

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_autotune.errors import ConfigError, nearest_hint

FORMULAS = "grpo_autotune.interop.adapters.formulas"
MATH_VERIFY = "math-verify as TRL calls it; "


@dataclass(frozen=True)
class Named:
    """A reward by its name elsewhere."""

    name: str = ""  # in `rewards`; empty where there is none
    params: Mapping[str, Any] = field(default_factory=dict)  # fixed ones
    settings: Mapping[str, str] = field(default_factory=dict)  # parameter -> key of the framework that gives it
    note: str = ""  # what differs; of one that is not here, what would be needed

    def item(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        given = {ours: arguments[theirs] for ours, theirs in self.settings.items() if arguments.get(theirs) is not None}
        params = {**self.params, **given}
        return {"name": self.name, **({"params": params} if params else {})}


_OVERLONG = {"max_completion_len": "max_completion_len", "soft_punish_cache": "soft_punish_cache"}
_REPETITION = {"ngram_size": "repetition_n_grams", "max_penalty": "repetition_max_penalty"}
_LENGTHS = ("min_value_wrong", "max_value_wrong", "min_value_correct", "max_value_correct")
_SWIFT_LENGTHS = ("min_len_value_wrong", "max_len_value_wrong", "max_len_value_correct", "min_len_value_correct")
_SANDBOX = "it runs programs in a sandbox: write an async reward that does (docs/rewards.md)"

NAMED: dict[tuple[str, str], Named] = {
    ("open-r1", "accuracy"): Named("accuracy_reward", note=f"{MATH_VERIFY}its options for malformed LaTeX differ"),
    ("open-r1", "format"): Named("regex", {"pattern": r"\A<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>(?m:$)"}),
    ("open-r1", "tag_count"): Named(f"{FORMULAS}:tag_count"),
    ("open-r1", "reasoning_steps"): Named(f"{FORMULAS}:reasoning_steps"),
    ("open-r1", "repetition_penalty"): Named(f"{FORMULAS}:repetition_of_words", settings=_REPETITION),
    ("open-r1", "cosine"): Named(
        "cosine_scaled_reward", {"max_len": 1000},
        {"max_len": "cosine_max_len", **{name: f"cosine_{name}" for name in _LENGTHS}},
        "its length is in tokens here, and in characters there: divide cosine_max_len by about 4"),
    ("open-r1", "soft_overlong_punishment"): Named("soft_overlong_punishment", settings=_OVERLONG),
    ("open-r1", "length"): Named(note="it compares lengths over the whole batch, right answers apart"),
    **{("open-r1", name): Named(note=_SANDBOX) for name in ("code", "binary_code", "ioi_code", "cf_code")},
    ("swift", "accuracy"): Named(
        "accuracy_reward", note=f"{MATH_VERIFY}the answer is not taken out of <answer> first, and a reference that "
        "cannot be read gives no score instead of 0"),
    ("swift", "format"): Named("regex", {"pattern": r"\A<think>.*?</think>\s*<answer>.*?</answer>\Z"}),
    ("swift", "react_format"): Named("regex", {"pattern": r"\A<think>.*?</think>\s*Action:.*?Action Input:.*?(?m:$)"}),
    ("swift", "cosine"): Named(
        "cosine_scaled_reward", dict(zip(_LENGTHS, (-0.5, 0.0, 0.5, 1.0), strict=True)),
        {"max_len": "cosine_max_len", **{a: f"cosine_{b}" for a, b in zip(_LENGTHS, _SWIFT_LENGTHS, strict=True)}},
        "right and wrong are told by math-verify as TRL calls it; cosine_max_len is max_completion_length by default"),
    ("swift", "repetition"): Named(f"{FORMULAS}:repetition_of_words", settings=_REPETITION),
    ("swift", "soft_overlong"): Named("soft_overlong_punishment", settings={
        "max_completion_len": "soft_max_length", "soft_punish_cache": "soft_cache_length"}),
}  # fmt: skip
"""Framework and the reward's name there -> the reward here (open-r1 src/open_r1/rewards.py at 1416fa0, ms-swift
swift/rewards/orm.py at 3602360)."""


def overlong_penalty(longest: int, buffer: int, factor: float = 1.0) -> dict[str, Any]:
    """verl's overlong buffer, in tokens: 0 up to `longest - buffer`, falling to -`factor` at `longest`."""
    params = {"max_completion_len": longest, "soft_punish_cache": buffer}
    return {"name": "soft_overlong_punishment", "weight": factor, "params": params}


TEXT = '''"""{framework}'s reward {function} of {path}, as TRL calls rewards. Written by grpo-autotune import."""

from grpo_autotune.interop.adapters.called import Called

_called = Called({style!r}, {path!r}, {function!r}, {arguments!r}, __file__)

if _called.is_async:

    async def {name}(completions, completion_ids, {columns}**others):
        return await _called.awaited(completions=completions, completion_ids=completion_ids, {given}**others)

else:

    def {name}(completions, completion_ids, {columns}**others):
        return _called(completions=completions, completion_ids=completion_ids, {given}**others)
'''

STYLES: dict[str, tuple[str, dict[str, str], str]] = {  # style -> framework, columns, those by name
    "verl": ("verl", {"ground_truth": "reward_model.ground_truth"}, "ground_truth, data_source, extra_info=None, "),
    **dict.fromkeys(("easyr1", "easyr1_each"), ("EasyR1", {"ground_truth": "answer"}, "ground_truth, ")),
    "swift": ("ms-swift", {}, ""),
}


@dataclass(frozen=True)
class Adapter:
    """A reward in another framework's form, ready to be written beside a configuration."""

    name: str  # file of the module
    text: str  # its content
    reward: dict[str, Any]  # item of `rewards`
    columns: dict[str, str]  # for `data.columns`, where the framework's data has its usual columns


def adapter(style: str, path: str, function: str, arguments: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter of a `function` of the file `path` (from the configuration's folder) or of ms-swift's registry, which
    is given further `arguments`. ConfigError for a style that is not known."""
    if style not in STYLES:
        raise ConfigError(f"no style of rewards {style}", where="style", fix=nearest_hint(style, STYLES))
    framework, columns, named = STYLES[style]
    plain = re.sub(r"\W", "_", function)
    name = f"{plain}_" if keyword.iskeyword(plain) or not plain.isidentifier() else plain
    names = re.findall(r"(\w+)(?:=None)?, ", named)
    text = TEXT.format(
        framework=framework, style=style, path=path, function=function, arguments=dict(arguments or {}),
        name=name, columns=named, given="".join(f"{one}={one}, " for one in names),
    )  # fmt: skip
    module = f"{style}_{name}"
    return Adapter(f"{module}.py", text, {"name": f"{module}:{name}"}, columns)
