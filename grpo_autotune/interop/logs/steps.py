"""A log told from a configuration, its rows of flat numbers, whatever the size of the file, and its steps: rows put
together, with what of them is of use."""

import ast
import csv
import gzip
import json
import math
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError
from grpo_autotune.units import duration, percent

MARKS = re.compile(
    r"timing_s[/\"]|train_speed\((?:s/it|iter/s)\)|\"log_history\"|['\"]step_time['\"]|\{'loss': |step_time,|,step_time"
)
CONFIGURATIONS = (".yaml", ".yml", ".sh", ".bash", ".py", ".ipynb", ".toml")
LOOKED_AT = 64 << 20  # characters of a file that are looked through for a mark


def is_log(path: Path) -> bool:
    """True for a file with marks of a training's log, or named as one; False for one named as a configuration."""
    if path.suffix in CONFIGURATIONS:
        return False
    if path.suffix in (".log", ".jsonl", ".csv", ".tsv", ".out", ".gz"):
        return True
    with opened(path) as file:
        done, tail = 0, ""
        while done < LOOKED_AT and (chunk := file.read(1 << 20)):
            if MARKS.search(tail + chunk):
                return True
            done, tail = done + len(chunk), chunk[-64:]
    return False


LONGEST = 1 << 20  # characters of a line that are read at once; a longer one counts as several
TELL_S = 3.0
SCREEN = re.compile(r"step:\d|\{['\"]")  # what a line has in it that may open a row: no other is looked at
NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|^(?:\x1b\[[0-9;]*m)*\(\w+ pid=\d+(?:, ip=[\d.]+)?\)(?:\x1b\[[0-9;]*m)* ?")
"""Colours, and the prefix that Ray puts in front of a worker's line."""
VERL = re.compile(r"(?:^|\s)step:(\d+) - (?=\S+:)")
DICT = re.compile(r"\{(?=[^{}]*'(?:loss|reward|train_runtime)':)'[^{}]*\}")
TORN = "lines that are torn"
NEXT = "(the next)"  # key of a row without a number of its own: a Trainer's dictionary on a console
LONG = (("key", "metric", "name", "metric_name"), ("value", "metric_value"))


class Row(NamedTuple):
    """Numbers that were logged at once, by the framework's own names."""

    line: int  # of the file, from 1; of a JSON list its entry
    values: dict[str, Any]


def opened(path: Path) -> TextIO:
    """The text of a file in UTF-8 or UTF-16, unpacked where it is gzip's; lines end as they are in it."""
    with path.open("rb") as file:
        reader: Any = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with reader(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return cast(TextIO, reader(path, "rt", encoding=encoding, errors="replace", newline="\n"))


def rows(path: Path, skipped: Counter[str]) -> Iterator[Row]:
    """The rows of a file; what looks like one and cannot be read is counted in `skipped`."""
    with opened(path) as file:
        head = file.read(1 << 16).lstrip()
    first = head.partition("\n")[0]
    row = _json(first)
    lines_of_json = path.suffix == ".jsonl" or (row is not None and "log_history" not in row)
    if re.match(r'\[\s*\{\s*"', head) or (re.match(r'\{\s*"', head) and not lines_of_json):
        return _entries(path)
    separator = max(",;\t", key=first.count)
    titles = {title.strip(' "\r').lower() for title in first.split(separator)}
    if path.suffix in (".csv", ".tsv") or (len(titles) > 2 and {"step", "_step"} & titles):
        return _table(path, separator)
    return _console(path, skipped)


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings with their keys joined by `/`; lists are left out."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            values |= flat(value, above if key == "data" and not above else f"{above}{key}/")
        elif not isinstance(value, list):
            values[f"{above}{key}"] = value
    return values


def _json(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _entries(path: Path) -> Iterator[Row]:
    try:
        with opened(path) as file:
            data = json.load(file)
    except (ValueError, RecursionError) as problem:
        what, fix = "this JSON is torn or no JSON", "Take the file that the run wrote, whole."
        raise ConfigError(f"{what} ({problem})", where=str(path), fix=fix) from problem
    entries = data.get("log_history", [data]) if isinstance(data, dict) else data
    for number, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
        if isinstance(entry, dict):
            yield Row(number, flat(entry))


def _table(path: Path, separator: str) -> Iterator[Row]:
    """A CSV with a column for each key, or with a line for each value; decimal commas where semicolons part them."""
    with opened(path) as file:
        lines = (line.replace(",", ".") for line in file) if separator == ";" else file
        reader = csv.DictReader(lines, delimiter=separator)
        try:
            cells = ((reader.line_num, row) for row in reader)
            by_name = {str(name).lower(): name for name in reader.fieldnames or []}
            key, value = (next((by_name[name] for name in names if name in by_name), None) for names in LONG)
            if key is None or value is None or "step" not in by_name:
                yield from (Row(line, {k: v for k, v in row.items() if v and k}) for line, row in cells)
                return
            step, when = by_name["step"], by_name.get("timestamp", by_name["step"])
            at = [(str(row[when]), line, row) for line, row in cells]  # numbers or dates, whose longer ones are later
            for _, line, row in sorted(at, key=lambda cell: (len(cell[0].partition(".")[0]), *cell[:2])):
                yield Row(line, {"step": row[step], str(row[key]): row[value]})
        except csv.Error as problem:
            raise ConfigError(f"no table that can be read ({problem})", where=str(path)) from problem


def _console(path: Path, skipped: Counter[str]) -> Iterator[Row]:
    for line, text in _joined(_pieces(path)):
        if text.startswith('{"'):
            row = _json(text)
            if row is not None:
                yield Row(line, flat(row))
            elif re.search(r'"(?:\w*step|loss|timing_s)\b', text):  # else a model may have said it
                skipped[TORN] += 1
        elif match := VERL.search(text):
            pairs = (part.strip().rpartition(":") for part in text[match.end() :].split(" - "))
            yield Row(line, {"step": match[1]} | {key: value.split(" ")[0] for key, _, value in pairs if key})
        else:
            for match in DICT.finditer(text):
                words = re.sub(r"np\.\w+\(([^()]*)\)", r"\1", re.sub(r"(?<=: )-?(?:nan|inf)\b", "None", match[0]))
                try:
                    yield Row(line, {NEXT: True} | ast.literal_eval(words))
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    skipped[TORN] += 1


def _pieces(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, split where a progress bar wrote over itself, with a word of progress now and then."""
    size, begun = path.stat().st_size, time.monotonic()
    told, line = begun, 0
    with opened(path) as file:
        while text := file.readline(LONGEST):
            line += 1
            if time.monotonic() - told > TELL_S:
                told, done = time.monotonic(), os.lseek(file.fileno(), 0, os.SEEK_CUR)
                left = duration((told - begun) * (size / done - 1.0))
                say(f"{path.name}: {percent(done / size)} read, about {left} left")
            for piece in text.rstrip("\r\n").split("\r"):
                yield line, piece


def _joined(pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Lines that may hold a row, each with what a narrow terminal or a printer put on the lines below it."""
    at, whole, last, width = 0, "", "", 0
    for line, raw in pieces:
        if not whole and not SCREEN.search(raw):
            continue
        text = NOISE.sub("", NOISE.sub("", raw))
        if whole and len(whole) < LONGEST and (glue := _continues(whole, text, last, width)) is not None:
            whole, last = whole + glue + text, text
            continue
        if whole:
            yield at, whole
        at, whole, last, width = (line, text, text, len(text)) if SCREEN.search(raw) else (0, "", "", 0)
    if whole:
        yield at, whole


def _continues(whole: str, text: str, last: str, width: int) -> str | None:
    """The text between a row and the next line of it; None where that line is none of it."""
    if VERL.search(text) or "{'" in text:
        return None
    if VERL.search(whole):
        parts = re.sub(r"^\s*(?:- )?|\s+-?\s*$", "", text).split(" - ")
        wrapped = len(parts) > 1 or text.lstrip().startswith("- ") or (text and width - 2 <= len(last) <= width)
        fits = not any(" " in part for part in parts) and all(":" in part for part in parts[1:-1])
        bare = whole.endswith(" -") or (text.startswith("- ") and not whole.endswith(" "))
        return (" " if bare else "") if wrapped and fits else None
    return "" if "{'" in whole and "}" not in whole[whole.rindex("{'") :] and whole.count("'") < 400 else None


RAY = "timing_s/"
TORN_TIMER = "(torn)"  # key of a step of which a timer is no number, or below zero
MOST_STEPS = 20_000  # steps that are kept, the last ones
COUNTERS = (  # keys that may number a step; of several in a row the first one here counts
    *("train/global_step", "training/global_step", "global_step/max_steps", "iteration", "step", "global_step"),
    *("Step", "_step"),
)
SPEEDS = ("train_speed(s/it)", "train_speed(iter/s)")
FACTS = {  # quantity -> keys of the frameworks that log it, any one of them
    "prompt tokens, mean": ("prompt_length/mean",),
    "completion tokens, mean": ("response_length/mean", "completions/mean_length", "completion_length"),
    "completion tokens, longest": ("response_length/max", "completions/max_length"),
    "completions cut off": ("response_length/clip_ratio", "completions/clipped_ratio"),
    "groups of equal rewards": ("frac_reward_zero_std",),
    "reward, mean": ("reward", "reward/overall", "critic/score/mean", "critic/rewards/mean"),
    "KL": ("kl", "actor/kl_loss"),
    "tokens": ("perf/total_num_tokens",),
    "tokens per second and GPU": ("perf/throughput",),
    "most memory, GiB": ("memory(GiB)", "perf/max_memory_allocated_gb", "actor/perf/max_memory_allocated_gb"),
}
READ = {key for keys in FACTS.values() for key in keys} | {
    *(*SPEEDS, "step_time", "perf/time_per_step", "train_runtime", "train_steps_per_second")
}
NOT_A_NUMBER = "values that are no finite number"


class LoggedSteps:
    """The steps of one file in their order: values, and the line that each begins on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[int, dict[str, float]] = {}
        self.lines: dict[int, int] = {}
        self.skipped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._last = 0
        try:
            for row in rows(path, self.skipped):
                self._take(row)
        except (EOFError, zlib.error):
            self.warnings.append("the packed file is cut off: what comes before is read")

    def _take(self, row: Row) -> None:
        values, step = self._of_use(row.values), self._number_of(row)
        if step is None or not values:
            self.skipped["rows without a step, or with nothing of use"] += 1
            return
        if step < self._last:  # a resumed run, or another one behind the first: what it does again is dropped
            dropped = [known for known in self.values if known >= step]
            for known in dropped:
                self._forget(known)
            self.skipped["steps of an earlier run"] += len(dropped)
            what = f"step numbers go back from {self._last} to {step}: the later run counts"
            self.warnings.append(f"line {row.line}: {what}")
        self._last = step
        self.values.setdefault(step, {}).update(values)
        self.lines.setdefault(step, row.line)
        if len(self.values) > MOST_STEPS:
            self._forget(next(iter(self.values)))
            self.skipped[f"steps before the last {MOST_STEPS}"] += 1

    def _forget(self, step: int) -> None:
        del self.values[step], self.lines[step]

    def _number_of(self, row: Row) -> int | None:
        key = next((key for key in COUNTERS if key in row.values), None)
        if key is None:
            return self._last + 1 if NEXT in row.values else None
        at = number(str(row.values[key]).partition("/")[0])
        return None if at is None else int(at)

    def _of_use(self, values: Mapping[str, Any]) -> dict[str, float]:
        read = {}
        for key, value in values.items():
            name = _name(key)
            if name not in READ and not name.startswith((RAY, "fully_async/")):
                if name == "elapsed_time" and (spent := _clock(str(value))) is not None:
                    read[name] = spent
                continue
            timer = name.startswith(RAY) and name.count("/") == 1
            if (as_number := number(value)) is not None and not (timer and as_number < 0.0):
                read[name] = as_number
            else:
                self.skipped[NOT_A_NUMBER] += 1
                read |= {TORN_TIMER: 1.0} if timer else {}
        return read


def number(value: Any) -> float | None:
    """A value as a finite number, without numpy's name around it and commas between thousands; None for all else."""
    if isinstance(value, str):
        value = re.sub(r"^(?:np\.\w+|tensor)\((.*)\)$", r"\1", value)
        value = value.replace(",", "") if re.match(r"-?\d{1,3}(,\d{3})+(\.|$)", value) else value
    with suppress(TypeError, ValueError):
        return finite if math.isfinite(finite := float(value)) else None
    return None


def _name(key: str) -> str:
    """The framework's own name of a key, without what a tracker or a panel puts in front of it."""
    if RAY in key:
        return "" if key.endswith(("__MIN", "__MAX")) else key[key.index(RAY) :]
    return key.rpartition(" - ")[2].removeprefix("metrics.").removeprefix("train/")


def _clock(text: str) -> float | None:
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([dhms])", text)
    return float(sum(int(count) * units[unit] for count, unit in parts)) if parts else None
