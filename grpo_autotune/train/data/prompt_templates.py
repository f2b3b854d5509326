"""Prompts made of a row's columns by `data.prompt_template`, a format string or Jinja."""

import string
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grpo_autotune.config.template_text import is_jinja
from grpo_autotune.errors import ConfigError

NOT_FIT = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError),
    jinja2.TemplateError,
)
"""Errors that a template raises, on a row or before."""

Render = Callable[[Mapping[str, Any]], str]


def compiled(template: str, where: str) -> tuple[Collection[str], Render]:
    """Names of the columns in a template, and what makes the prompt of a row of them, which raises one of `NOT_FIT`;
    ConfigError, which names `where`, if it is neither Jinja nor a format string over plain names."""
    if is_jinja(template):
        return _jinja(template, where)

    def render(cells: Mapping[str, Any]) -> str:
        return template.format(**{name: _shown(cell) for name, cell in cells.items()})

    return _fields(template, where), render


def _shown(cell: Any) -> Any:
    """A value that goes into a prompt; ValueError for None, which would be shown as `None`."""
    if cell is None:
        raise ValueError("a column that it names is empty there")
    return cell


def _jinja(template: str, where: str) -> tuple[Collection[str], Render]:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=_shown)
    try:
        names = sorted(meta.find_undeclared_variables(environment.parse(template)))
        return names, environment.from_string(template).render
    except NOT_FIT as error:
        line = getattr(error, "lineno", None)
        told = f"no Jinja template{f', line {line}' if line else ''}: {error}"
        raise ConfigError(told, where=where, fix="Columns stand in double braces: {{ question }}.") from error


def _fields(template: str, where: str) -> list[str]:
    """Names of the columns in a template; ConfigError if it is not a format string over plain names."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        flaw = next((f"{{{field}}} is not the name of a column" for field in fields if not field.isidentifier()), "")
    except ValueError as error:
        flaw = f"not a format string: {error}"
    if flaw:
        raise ConfigError(flaw, where=where, fix="Write a literal brace twice: {{ or }}.")
    return fields
