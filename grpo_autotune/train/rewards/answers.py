"""Reading an answer out of a text: a number, a letter, a box.

The same reading serves a completion and the reference in the data, so that both may carry the marks people use:
`<answer>72</answer>`, `\\boxed{72}`, or `#### 72` (GSM8K, Cobbe et al. 2021, arXiv:2110.14168). Of several only the
last counts, so listing many answers earns nothing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
BOXED = "\\boxed{"

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    r"(?<![\w^.)\]}])"
    r"(?P<sign>[-+]?)[$€£¥]?(?P<sign2>[-+]?)"
    r"(?:(?P<whole>\d+)\s+(?=\d+/\d))?"
    rf"(?P<top>{_DIGITS})(?P<exponent>[eE][-+]?\d+)?(?:/(?P<bottom>{_DIGITS})(?![\w/]))?"
)
"""A number, perhaps with sign, currency, commas, exponent, as a fraction or mixed; not the 2 of m^2 or of H2O."""

BOX = re.compile(r"[\[(]\s*({0})\s*,\s*({0})\s*,\s*({0})\s*,\s*({0})\s*[\])]".format(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"))


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion as TRL hands it to rewards: plain, or of the assistant's last message."""
    if isinstance(completion, str):
        return completion
    spoken = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = (spoken or list(completion))[-1].get("content") if completion else None
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content if part.get("type", "text") == "text")


def final_answer(text: str) -> str:
    """The answer in a text: the last one between tags or in a box, or what follows the last `####`; else all of it."""
    tagged = ANSWER_TAG.findall(text)
    if tagged:
        text = str(tagged[-1])
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    _, mark, after = text.rpartition("####")
    if mark and not tagged:
        return after.strip().partition("\n")[0].strip()
    return text.strip()


def read_number(answer: object) -> float | None:
    """The last number in an answer, units and currency ignored; None where there is none.

    `1,234.50`, `$-3`, `\\frac{1}{2}`, `1 1/2`, `2.5e3` and `50%` (as 50) are understood."""
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return float(answer)
    numbers = list(NUMBER.finditer(_plain(final_answer(str(answer)))))
    return _value(numbers[-1]) if numbers else None


def read_letter(answer: object, letters: str = "ABCDE") -> str | None:
    """The one of `letters` that an answer chooses, a text or a whole number, which counts from the first (as
    ScienceQA's `answer` does); None where it chooses none, or more than one."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return letters[answer] if 0 <= answer < len(letters) else None
    text = " ".join(final_answer(str(answer)).split())
    bare = re.sub(r"[\s()\[\]{}.:*\"'`$]|\\text", "", text).upper()
    if len(bare) == 1:
        return bare if bare in letters else None
    one = f"[{re.escape(letters)}]"
    for pattern in (
        rf"(?i:answer|choice|option)(?i:\s+is|\s*[:=])?\s*[:=]?\s*(?i:option\s+|choice\s+)?[*\"'(\[]*({one})(?![\w'])",
        rf"[(\[]({one})[)\]]",
        rf"(?:^|\s)({one})\s?[):\]]",
        rf"^[\s*]*({one})\s?\.",
        rf"(?<![\w'])(?<!\bnot )({one})(?![\w'])(?!\s+(?!is\b|and\b|or\b)[a-z])",
    ):
        chosen = set(re.findall(pattern, text))
        if chosen:
            return _sole(chosen, pattern, text, one)
    return None


def read_box(answer: object) -> tuple[float, float, float, float] | None:
    """The last `[x1, y1, x2, y2]` of an answer, from text or from a list of four numbers; None where there is none."""
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        if len(answer) != 4 or not all(isinstance(side, (int, float)) for side in answer):
            return None
        return float(answer[0]), float(answer[1]), float(answer[2]), float(answer[3])
    boxes = BOX.findall(final_answer(str(answer)))
    if not boxes:
        return None
    left, top, right, bottom = (float(side) for side in boxes[-1])
    return left, top, right, bottom


def _sole(chosen: set[str], pattern: str, text: str, one: str) -> str | None:
    """The letter chosen last, unless the text hedges ("A or B") there or different letters stand unranked."""
    last = list(re.finditer(pattern, text))[-1]
    if re.match(rf"[)\]*\"']*\s*(?:or|and|/|,|&)\s*[(\[*\"']*{one}(?![\w'])", text[last.end(1) :]):
        return None
    ranked = "answer" in pattern
    return str(last[1]) if ranked or len(chosen) == 1 else None


def _last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}`, braces inside it balanced; None where it is absent or never closed."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def _plain(text: str) -> str:
    """LaTeX and typographic ways to write a number, put plainly."""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!]|\u202f|\u2009|\u00a0)(?=\d{3}(?!\d))", "", text)
    return (
        text.replace("\\$", "$").replace("\u2212", "-").replace("\\left", "").replace("\\right", "").replace("**", " ")
    )


def _value(match: re.Match[str]) -> float | None:
    bottom = float(match["bottom"].replace(",", "")) if match["bottom"] else 1.0
    if bottom == 0:
        return None
    top = float(match["top"].replace(",", "") + (match["exponent"] or ""))
    value = float(match["whole"] or 0) + top / bottom
    return -value if "-" in (match["sign"], match["sign2"]) else value
