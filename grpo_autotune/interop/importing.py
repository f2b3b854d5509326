"""A file of another framework to a `RunConfig`, from reading to the record of what became of it."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from grpo_autotune.interop.recognise import read_source
from grpo_autotune.interop.translation import Translation


def import_file(
    path: Path, *, framework: str | None = None, version: str | None = None, world_size: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Translation:  # fmt: skip
    """Read a file and translate it, by the module of its framework in `interop/frameworks/`.

    Args:
        path: The file.
        framework: Its framework, where the file does not tell.
        version: The framework's version that it was written for; None to take it from the file, or the latest known.
        world_size: Training processes of the result; None for the source's own.
        environment: Variables, and by number arguments, that a script is started with.
    """
    source = read_source(path, framework, environment)
    name = source.framework.removeprefix("ms-").replace("-", "_")
    translation: Translation = import_module(f"{__package__}.frameworks.{name}").translate(source, version, world_size)
    return translation
