"""The entrance of the program, and the one place that catches this package's errors."""

import sys
from collections.abc import Sequence
from typing import Any

import typer

from grpo_autotune.cli import interop, running, showing, using  # noqa: F401 - their commands
from grpo_autotune.cli.app import app
from grpo_autotune.console import accept_any_text, complain
from grpo_autotune.errors import LONGEST, AutotuneError, ConfigError, EnvironmentProblem, printable, shortened
from grpo_autotune.processes.ending import raising, signal_of

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""`UsageError` of the Click that Typer holds; Typer exports only its subclasses."""


def _usage(error: Any) -> str:
    """A mistake on the command line, the option or argument named, and the command that lists what there is."""
    message = error.format_message()
    command = f"{error.ctx.info_name} " if error.ctx is not None and error.ctx.parent is not None else ""
    line = shortened(printable(message), LONGEST // 2)
    return f"{line if line.endswith(('.', '?')) else f'{line}.'} See `grpo-autotune {command}--help`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (1 error, 2 configuration, 3 environment, 4 nothing succeeded).

    Typer only parses: run by Typer, a script's Ctrl-C or end of input would end with another exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = words[:1] == ["--debug"]
    accept_any_text()
    try:
        with raising():
            action = app(words, standalone_mode=False)
            return int((action() if callable(action) else action) or 0)
    except AutotuneError as error:
        if debug:
            raise
        complain(f"grpo-autotune: {error}", everywhere=not isinstance(error, ConfigError | EnvironmentProblem))
        return error.exit_code
    except USAGE_ERROR as error:
        complain(f"grpo-autotune: {_usage(error)}", everywhere=False)
        return ConfigError.exit_code
    except KeyboardInterrupt as error:
        signum, name = signal_of(error)
        complain(f"grpo-autotune: stopped by {name}", everywhere=False)
        return 128 + signum
