"""The exception tree: every mistake a user can make is one of these, and only `cli.main` catches them.

A message is one line: what is wrong, where (a key path, a file, a row), and what to do.
"""

from __future__ import annotations


class AutotuneError(Exception):
    """Base of all errors of this package.

    Args:
        what: What is wrong, in one sentence.
        where: Key path, file or row it concerns; put in front of the message.
        fix: What the user can do; put behind it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{line.rstrip('.')}. {self.fix}" if self.fix else line
        return " ".join(line.split())


class ConfigError(AutotuneError):
    """The configuration cannot be used: unknown key, wrong type, impossible arithmetic, missing file or column."""

    exit_code = 2


class EnvironmentProblem(AutotuneError):
    """The machine or an installed package cannot do what is asked: a missing extra, an unsupported version."""

    exit_code = 3


class NothingSucceeded(AutotuneError):
    """Work ended without a single usable result."""

    exit_code = 4


class DataError(AutotuneError):
    """A row of the data cannot be used, such as an image that cannot be read."""


class RewardError(AutotuneError):
    """A reward function raised, returned the wrong number of values, or returned only None."""


class TrainingError(AutotuneError):
    """Training cannot go on, such as a loss that is not a number."""


class SeamError(EnvironmentProblem):
    """The installed TRL or vLLM lacks a method that the probe or a speed-up has to wrap."""
