"""YAML and JSON as settings with their lines, Hydra's `defaults` beside the file, and OmegaConf's interpolations."""

import re
from collections.abc import Iterator
from itertools import islice

import yaml

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.source import Setting

MOST_SETTINGS = 20_000


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it: `1e-6` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:timestamp"
    ]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}  # fmt: skip


def yaml_settings(text: str, name: str, nested: bool = True) -> dict[str, Setting]:
    """Settings of a YAML or JSON text, names joined by dots; those of a later document win. `nested=False` leaves
    mappings inside as values, as in frameworks whose keys are flat. ConfigError, `name` and line named, for a text
    that cannot be read or holds no mapping."""
    loader = _Loader(text.replace("\t", " ") if text.lstrip().startswith("{") else text)
    settings: dict[str, Setting] = {}
    try:
        while loader.check_node():
            node = loader.get_node()
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError("this holds no settings (no mapping of keys to values)", where=name)
            settings |= dict(islice(_leaves(loader, node, "", nested), MOST_SETTINGS))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = name if mark is None else f"{name}, line {mark.line + 1}"
        raise ConfigError(f"this YAML cannot be read: {getattr(error, 'problem', error)}", where=where) from None
    except (RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"this YAML cannot be read: {error}", where=name) from None
    return settings


def _leaves(loader: _Loader, node: yaml.MappingNode, prefix: str, nested: bool) -> Iterator[tuple[str, Setting]]:
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value if isinstance(key_node, yaml.ScalarNode) else '?'}"
        if nested and isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _leaves(loader, value_node, f"{key}.", nested)
        else:
            yield key, Setting(loader.construct_object(value_node, deep=True), key_node.start_mark.line + 1)
