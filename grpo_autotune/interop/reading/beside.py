"""Files that a configuration names: its own paths are those of another machine, or of the folder it is started in."""

import re
from pathlib import Path, PurePosixPath

from grpo_autotune.errors import ConfigError

MOST_BYTES = 20_000_000
SUBSTITUTION = re.compile(r"(\$\((?:[^()]|\([^()]*\))*\)|\$\{?\w+\}?)/?")
"""Parts of a path that only a run of a script can tell."""


def beside(path: Path, named: str) -> Path | None:
    """The file that `path` means by `named`: the name as it stands, else its last parts in the folder of `path` or
    one above, the longest that exist. None if there is none."""
    known = SUBSTITUTION.sub("", named)
    parts = PurePosixPath(known).parts
    folders = [path.absolute().parent, *path.absolute().parents[1:5]]
    ends = [Path(*parts[start:]) for start in range(len(parts))]
    candidates = [Path(known).expanduser(), *(folder / end for end in ends for folder in folders)]
    try:
        return next((file for file in candidates if file.is_file()), None)
    except (OSError, ValueError):  # no name of a file
        return None


def text_of(path: Path) -> str:
    """The text of a configuration. ConfigError for a file that is missing, empty, huge, or no text."""
    if path.is_dir():
        raise ConfigError("this is a folder", where=str(path), fix="Name the file in it.")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"more than {MOST_BYTES // 10**6} MB: no configuration is that long", where=str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ConfigError("this is no text, but a program or data", where=str(path))
    if not text.strip():
        raise ConfigError("the file is empty", where=str(path))
    return text.replace("\r\n", "\n")
