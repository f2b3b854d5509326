"""The last words on an export: a head that says what was changed and measured, or a patch."""

import difflib
import textwrap
from collections.abc import Sequence
from pathlib import Path

from grpo_autotune.errors import printable
from grpo_autotune.interop.writing.python_edits import code_of
from grpo_autotune.records.imported import ExportedKey, titled
from grpo_autotune.records.receipt import Receipt
from grpo_autotune.units import seconds

WIDTH = 108


def is_patch(path: Path) -> bool:
    """True of programs, which nobody edits but their author."""
    return path.suffix.lower() in (".py", ".ipynb")


def measured_line(receipt: Receipt, framework: str) -> str:
    """The place where the tuned values were measured, and the one where they were not."""
    trl = receipt.versions.get("trl", "")
    interval = f"{receipt.speedup_low:.2f} to {receipt.speedup_high:.2f}"
    return (
        f"Measured with TRL{f' {trl}' if trl else ''} on {printable(receipt.hardware)}: x {receipt.speedup:.2f} "
        f"({interval}) useful completions per second, {seconds(receipt.baseline_step_s)} -> {seconds(receipt.step_s)} "
        f"per optimizer step. Whether it is faster in {titled(framework)} was not measured."
    )


def plain_text(path: Path) -> str:
    """A file's text without a byte order mark, its lines ended as here."""
    raw = path.read_bytes().decode("utf-8-sig")
    return raw.replace("\r\n", "\n") if _is_crlf(raw) else raw


def _is_crlf(text: str) -> bool:
    return text.count("\r\n") == text.count("\n") > 0


def finished(path: Path, text: str, keys: Sequence[ExportedKey], measured: str) -> str:
    """Text to write: of a program a patch; else the text below a comment (JSON has none), with the byte order mark
    and the ends of lines that the file has."""
    if is_patch(path):
        return patch(path, text)
    raw = path.read_bytes().decode()
    mark = "\ufeff" if raw.startswith("\ufeff") else ""
    if keys and path.suffix.lower() != ".json":
        text = headed(text, f"Tuned by grpo-autotune: {', '.join(map(str, keys))}. {measured}")
    return mark + (text.replace("\n", "\r\n") if _is_crlf(raw) else text)


def patch(path: Path, text: str) -> str:
    """The difference as a unified diff; of a notebook, that of its code."""
    old, new = (code_of(text) if path.suffix == ".ipynb" else text for text in (plain_text(path), text))
    names = f"a/{path.name}", f"b/{path.name}"
    return "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="")) + "\n"


def headed(text: str, words: str) -> str:
    """The text below a comment, and that below the name of a shell."""
    wrapped = textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)
    head = "".join(f"# {line}\n" for line in wrapped)
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{head}{rest}" if first.startswith("#!") else head + text
