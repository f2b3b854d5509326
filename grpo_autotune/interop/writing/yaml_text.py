"""An imported configuration as YAML for people, with the reasons behind the keys that are not obvious."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.yaml_text import write_yaml
from grpo_autotune.errors import printable
from grpo_autotune.records.imported import Imported, titled

WIDTH = 110  # characters of a line; a comment that does not fit behind its key stands above it


def yaml_text(imported: Imported, comments: Mapping[str, str]) -> str:
    """The YAML, with a head that says where it comes from, and `comments` by key path."""
    sections: dict[str, Any] = {}
    for name in (name for name in RunConfig.model_fields if name in imported.config):
        section, fields = imported.config[name], getattr(RunConfig.model_fields[name].annotation, "model_fields", ())
        is_mapping = isinstance(section, dict)
        sections[name] = {key: section[key] for key in fields if key in section} | section if is_mapping else section
    version = printable(f"{titled(imported.source, imported.version)} ({imported.version_from})")
    ranks = f"{imported.world_size} process{'es' * (imported.world_size > 1)}"
    words = (
        f"By grpo-autotune import, from {printable(imported.file)}, {version}. Batch sizes are for {ranks}; the source "
    )
    words += f"has {imported.numbers['D']}."
    head = textwrap.wrap(words, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in head) + commented(write_yaml(sections), comments)


def commented(text: str, comments: Mapping[str, str]) -> str:
    """YAML text of mappings, each comment behind the value of its key path, or above it where it does not fit."""
    lines = text.split("\n")
    places = {path: (start, end) for path, start, end in _places(yaml.compose(text))}
    for path in sorted(comments.keys() & places.keys(), key=lambda path: places[path], reverse=True):
        start, end = places[path]
        comment = printable(comments[path])
        line, indent = lines[start], len(lines[start]) - len(lines[start].lstrip())
        if start == end and len(line) + len(comment) + 4 <= WIDTH:
            lines[start] = f"{line}  # {comment}"
        else:
            wrapped = textwrap.wrap(comment, WIDTH - indent - 2, break_long_words=False)
            lines[start:start] = [f"{' ' * indent}# {part}" for part in wrapped]
    return "\n".join(lines)


def _places(node: Any, above: str = "") -> Iterator[tuple[str, int, int]]:
    """Each key path with the line of its key and the last one of its value; a section's own line is its last."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        path, line = f"{above}{key.value}", key.start_mark.line
        yield path, line, value.end_mark.line if isinstance(value, yaml.ScalarNode) or value.flow_style else line
        yield from _places(value, f"{path}.")
