"""Templates that a configuration gives as text or as a file: both are text from then on, so that what a run stores
needs no such file."""

import re
import string
from pathlib import Path

from grpo_autotune.errors import ConfigError

ENDINGS = (".jinja", ".jinja2", ".j2")
JINJA = "{# jinja #}"
"""Says of a prompt template that it is Jinja, where single braces would make it a format string."""


def chat_template_text(value: str | None) -> str | None:
    """The text of a chat template; ConfigError for a file that is not there."""
    return value if value is None or not _is_file_name(value) else _read(value, "model.chat_template")


def prompt_template_text(value: str | None) -> str | None:
    """The text of a prompt template, of which `is_jinja` is true if it was a file; ConfigError as above."""
    if value is None or not _is_file_name(value):
        return value
    text = _read(value, "data.prompt_template")
    return text if is_jinja(text) else JINJA + text


def is_jinja(template: str) -> bool:
    """True for a prompt template in Jinja: one with `{%`, with `{#`, or with `{{ }}` and without a column in single
    braces, which as a format string would give each row the same prompt, or none."""
    if re.search(r"(?<!{){[%#]", template):
        return True
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template)]
    except ValueError:
        fields = []
    return "{{" in template and not any(name and name.isidentifier() for name in fields)


def _is_file_name(value: str) -> bool:
    return value.endswith(ENDINGS) and "\n" not in value and "{" not in value


def _read(name: str, where: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot read {name}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(what, where=where, fix=f"Paths start from {Path.cwd()}.") from error
