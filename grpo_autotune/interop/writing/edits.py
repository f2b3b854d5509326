"""Every edit that might set a key in a file, by the file's kind, the one closest to the user's own text first."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_autotune.interop.writing.python_edits import notebook_edits, python_edits
from grpo_autotune.interop.writing.shell_edits import OPTION, OVERRIDE, shell_edits
from grpo_autotune.interop.writing.yaml_edits import yaml_edits

HYDRA = ("verl", "easyr1")


def edits(path: Path, text: str, key: str, value: Any, framework: str) -> Iterator[str]:
    """Texts of the file with the key set."""
    plain = value if isinstance(value, str) else json.dumps(value)
    kind, name = path.suffix.lower(), key.rpartition(".")[2]
    if kind in (".yaml", ".yml"):
        return yaml_edits(text, key, plain)
    if kind == ".json":
        return yaml_edits(text, key, json.dumps(value))
    if kind in (".py", ".ipynb"):
        return (python_edits if kind == ".py" else notebook_edits)(text, name, repr(value))
    if framework not in HYDRA:
        return shell_edits(text, key, shlex.quote(plain), OPTION)
    return shell_edits(text, key, str(value) if isinstance(value, bool) else shlex.quote(plain), OVERRIDE)
