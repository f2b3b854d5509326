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


def patch(path: Path, before: str, after: str) -> str:
    """The difference as a unified diff; of a notebook, that of its code."""
    old, new = (code_of(text) if path.suffix == ".ipynb" else text for text in (before, after))
    names = f"a/{path.name}", f"b/{path.name}"
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="")
    return "\n".join(lines) + "\n"


def headed(text: str, keys: Sequence[ExportedKey], measured: str, path: Path) -> str:
    """The text below a comment; JSON, which has none, and a text without a change as it is."""
    if not keys or path.suffix.lower() == ".json":
        return text
    words = f"Tuned by grpo-autotune: {', '.join(map(str, keys))}. {measured}"
    head = "".join(
        f"# {line}\n" for line in textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)
    )
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{head}{rest}" if first.startswith("#!") else head + text
