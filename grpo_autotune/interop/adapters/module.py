"""The module that is written beside a configuration: it names another framework's reward function to TRL."""

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_autotune.errors import ConfigError, nearest_hint

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

STYLES: dict[str, tuple[str, dict[str, str], str]] = {
    "verl": ("verl", {"ground_truth": "reward_model.ground_truth"}, "ground_truth, data_source, extra_info=None, "),
    "easyr1": ("EasyR1", {"ground_truth": "answer"}, "ground_truth, "),
    "swift": ("ms-swift", {}, ""),
}
"""Style -> framework, columns of its data by our names, and the columns that the module takes by name."""


@dataclass(frozen=True)
class Adapter:
    """A reward in another framework's form, ready to be written beside a configuration."""

    name: str  # file of the module
    text: str  # its content
    reward: dict[str, Any]  # item of `rewards`
    columns: dict[str, str]  # for `data.columns`, where the framework's data has its usual columns


def adapter(style: str, path: str, function: str, arguments: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter of a `function` of the Python file `path` (from the configuration's folder), or of an ms-swift
    plugin's registered name; the framework's configuration gives it further `arguments`, for a plugin's class the
    settings that it finds in `args`. ConfigError for a style that is not known."""
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
