"""Signs inside the texts that a shell script is evaluated to, of Unicode's private use: the line each part is written
on, white space that does not split a word, and what a run alone can tell."""

import re
from collections.abc import Iterator

LINE, END, UNKNOWN, QUOTED, DIGITS = "\ue010", "\ue011", "\ue012", "\ue013", 0xE020
AT = re.compile(f"{LINE}([{chr(DIGITS)}-{chr(DIGITS + 9)}]+){END}")
SPACES = " \t\n\r"
_QUOTE = {ord(space): chr(0xE030 + place) for place, space in enumerate(SPACES)}
_KEEP = {ord(space): chr(0xE040 + place) for place, space in enumerate(SPACES)}
_STORE = {ord(sign): chr(space) for space, sign in _QUOTE.items()} | {ord(QUOTED): None}
_SHOW = _STORE | {ord(sign): chr(space) for space, sign in _KEEP.items()} | {ord(UNKNOWN): None}


def at(line: int) -> str:
    """The sign that what follows is written on this line."""
    return LINE + "".join(chr(DIGITS + int(digit)) for digit in str(line)) + END


def kept(text: str) -> str:
    """A part of a script that only its run can evaluate, as it is written and in one piece."""
    return UNKNOWN + text.translate(_KEEP)


def quoted(text: str) -> str:
    """Text in quotes: a word even if it is empty, and its white space splits nothing."""
    return QUOTED + text.translate(_QUOTE)


def stored(text: str) -> str:
    """A text as the value of a variable, which quotes have no part in."""
    return text.translate(_STORE)


def plain(text: str) -> str:
    """The value without its lines; what is unknown still bears its sign."""
    return AT.sub("", stored(text))


def shown(text: str) -> str:
    """The text as a program receives it."""
    return AT.sub("", text).translate(_SHOW)


def is_unknown(text: str) -> bool:
    """True if a part of the text is only known where the script runs."""
    return UNKNOWN in text


def line_of(text: str) -> int | None:
    """The line on which the text's first character is written."""
    start = re.match(f"{QUOTED}*(?:{AT.pattern}{QUOTED}*)+", text)
    return int("".join(str(ord(digit) - DIGITS) for digit in AT.findall(start[0])[-1])) if start else None


def fields(text: str) -> Iterator[str]:
    """The words that a text splits into, each with its line."""
    sign = ""
    for part in re.split(f"[{SPACES}]+", text):
        if AT.sub("", part):
            yield stored(part if line_of(part) else sign + part)
        sign = next((match[0] for match in reversed(list(AT.finditer(part)))), sign)
