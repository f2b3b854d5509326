"""A file of another framework to a `RunConfig`, from reading to the record of what became of it."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Final

from grpo_autotune.errors import ConfigError
from grpo_autotune.interop.recognise import read_source
from grpo_autotune.interop.translation import Translation

FRAMEWORKS: Final[Mapping[str, str]] = {
    "verl": "verl",
    "easyr1": "easyr1",
    "ms-swift": "swift",
    "trl": "trl",
    "open-r1": "open_r1",
    "vlm-r1": "vlm_r1",
    "r1-v": "r1_v",
    "unsloth": "unsloth",
    "deepspeed": "deepspeed",
    "accelerate": "accelerate",
}
"""Framework -> its module in `interop/frameworks/`, loaded when it is needed."""


def import_file(
    path: Path,
    *,
    framework: str | None = None,
    version: str | None = None,
    world_size: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Translation:
    """Read a file and translate it.

    Args:
        path: The file.
        framework: Its framework, where the file does not tell.
        version: The framework's version that it was written for; None to take it from the file, or the latest known.
        world_size: Training processes of the result; None for the source's own.
        environment: Variables, and by number arguments, that a script is started with.
    """
    source = read_source(path, framework, environment)
    name = f"{__package__}.frameworks.{FRAMEWORKS[source.framework]}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(f"{source.framework} is not read yet", where=path.name) from None
    translation: Translation = module.translate(source, version, world_size)
    return translation
