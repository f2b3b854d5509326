"""Sources of other frameworks made by hand, and what becomes of them."""

from importlib import import_module
from pathlib import Path
from typing import Any

from grpo_autotune.interop.source import Setting, Source
from grpo_autotune.interop.translation import Translation
from grpo_autotune.records.imported import Imported, ImportedRow


def source(framework: str, values: dict[str, Any], **others: Any) -> Source:
    """A source whose settings all stand on line 1."""
    return Source(framework, Path("run.sh"), {key: Setting(value, 1) for key, value in values.items()}, **others)


def translated(read: Source, version: str | None = None, world_size: int | None = None) -> Translation:
    """The source by its framework's module."""
    module = import_module(f"grpo_autotune.interop.frameworks.{read.framework}")
    translation: Translation = module.translate(read, version, world_size)
    return translation


def value_at(config: Any, path: str) -> Any:
    """The value of a key path; None if it is not there."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def row(imported: Imported, key: str) -> ImportedRow:
    """The one row of a setting."""
    (only,) = [row for row in imported.rows if row.key == key]
    return only
