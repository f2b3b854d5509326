"""The exception tree: a mistake of the user's is one of these, and only `cli.main` catches them.

A message is one line: what is wrong, where (a key path, a file, a row), and what to do. For a name that does not exist
`nearest` finds the one that was probably meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`; None where none is `cutoff` alike (0 to 1, as `difflib` counts)."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def nearest_hint(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Suggestion for an error about a name that does not exist: `Nearest: ...`, else `otherwise`."""
    near = nearest(name, known)
    return f"Nearest: {near}." if near else otherwise


def nearest_path(path: str, known: Sequence[str]) -> str | None:
    """The known key path that was probably meant: the same key of another section, else a similar one, here first."""
    section, _, name = path.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(known)}
    if name in anywhere:
        return anywhere[name]
    if near := nearest(name, beside, cutoff=0.5):
        return beside[near]
    near = nearest(name, anywhere)
    return anywhere[near] if near else None
