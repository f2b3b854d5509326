"""The exception tree: a mistake of the user's is one of these, and only `cli.main` catches them.

A message is one printable line of at most `LONGEST` characters: what is wrong, where (a key path, a file, a row), and
what to do. For a name that does not exist `nearest` finds the one that was probably meant.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

LONGEST = 370
"""Characters of a message; the command's name and a rank's number still fit in front of it in 400."""


class AutotuneError(Exception):
    """Base of all errors of this package: what is wrong, in one sentence, behind the key path, file or row it concerns,
    and in front of what the user can do."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        where, what, fix = (printable(part or "") for part in (self.where, self.what, self.fix))
        parts = [where, what.rstrip(".") if fix else what, fix]
        where, what, fix = _fitted(parts, LONGEST - len(". ") - len(": "))
        line = f"{where}: {what}" if where else what
        return f"{line}. {fix}" if fix else line


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


class MergeError(AutotuneError):
    """A merged model is not the trained one, or cannot be told from its base."""


class SeamError(EnvironmentProblem):
    """The installed TRL or vLLM lacks a method that the probe or a speed-up has to wrap."""


def printable(text: str) -> str:
    """The text in one line, white space as single spaces, and each control character as its escape."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def with_row_numbers(text: str, numbers: Mapping[int, int]) -> str:
    """A text in which each "row 3" is the row of that place in `numbers`, by its number there."""
    return re.sub(r"\brow (\d+)", lambda row: f"row {numbers.get(int(row[1]), row[1])}", text)


def shortened(text: str, most: int) -> str:
    """The text, its middle left out where it has more than `most` characters."""
    tail = (most - 5) // 3
    return text if len(text) <= most else f"{text[: most - 5 - tail]} ... {text[-tail:]}"


def _fitted(parts: list[str], most: int) -> list[str]:
    """Parts shortened to `most` characters in all: the longest first, as long as they do not fit."""
    shares, room = [0] * len(parts), most
    for done, place in enumerate(sorted(range(len(parts)), key=lambda place: len(parts[place]))):
        shares[place] = min(len(parts[place]), room // (len(parts) - done))
        room -= shares[place]
    return [shortened(part, share) for part, share in zip(parts, shares, strict=True)]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`; None where none is `cutoff` alike (0 to 1, as `difflib` counts)."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def nearest_hint(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Suggestion for an error about a name that does not exist: `Nearest: ...`, else `otherwise`."""
    near = nearest(name, known)
    return f"Nearest: {near}." if near else otherwise


def nearest_path(path: str, known: Sequence[str]) -> str | None:
    """The known key path that was probably meant: the same key of another section, else one typed wrongly, here first.
    A key that only resembles another one is no mistake in typing: the advice would change the run."""
    section, _, name = path.rpartition(".")
    anywhere = {key.rpartition(".")[2]: key for key in reversed(known)}
    if name in anywhere:
        return anywhere[name]
    beside = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    for keys in (beside, anywhere):
        slips = {key: _slips(name, key) for key in keys}
        least = min(slips.values(), default=3)
        closest = [key for key, count in slips.items() if count == least]
        if len(closest) == 1 and least <= (1 if len(name) < 8 else 2):
            return keys[closest[0]]
    return None


def _slips(typed: str, meant: str) -> int:
    """Slips between two words: letters too many, missing or exchanged count 1, a wrong one 2 (Damerau 1964)."""
    if abs(len(typed) - len(meant)) > 2:
        return 3
    before, row = [0], list(range(len(meant) + 1))
    for i, letter in enumerate(typed, 1):
        before, last, row = row, before, [i]
        for j, other in enumerate(meant, 1):
            cost = min(row[-1], before[j]) + 1
            cost = min(cost, before[j - 1] + 2 * (letter != other))
            if i > 1 and j > 1 and (letter, other) == (meant[j - 2], typed[i - 2]):
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
