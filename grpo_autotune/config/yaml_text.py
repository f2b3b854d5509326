"""YAML for configurations: the scalars of YAML 1.2, and a key given twice is an error.

PyYAML follows YAML 1.1, where `learning_rate: 1e-6` is text and `save_strategy: no` is false, neither of which is meant
in a training configuration; here the first is a number and the second is text (the core schema,
yaml.org/spec/1.2.2, section 10.3).
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from grpo_autotune.errors import ConfigError

SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)
"""Tag, pattern, and possible first characters (NUL: the empty scalar). Whole numbers are tried first."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which YAML 1.1 *or* 1.2 would read as something else, so that every reader agrees."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """A text node; one of Unicode's own line breaks needs double quotes, else it is read back as a space."""
    style = '"' if any(line_break in text for line_break in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
for _tag, _pattern, _first in SCALARS:
    _compiled, _starts = re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    _Loader.add_implicit_resolver(_tag, _compiled, _starts)
    _Dumper.add_implicit_resolver(_tag, _compiled, _starts)


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document from the file or option `where`; ConfigError if it is no YAML, or gives a key twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError(f"cannot read this YAML: {error.problem or error.context}", where=at) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read this YAML: {error}", where=where) from error


def write_yaml(value: Any) -> str:
    """The YAML text of plain Python values, keys in their order; `parse_yaml` gives the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False)
