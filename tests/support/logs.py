"""Logs as each framework writes them, made by hand: seconds of stages that sum to the step, in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

TIMED = {"gen": 50.0, "reward": 4.0, "old_log_prob": 6.0, "ref": 5.0, "adv": 0.5, "update_actor": 30.0}
"""Seconds of a step of verl, less 0.05 that no timer holds."""
LENGTHS = {"prompt_length/mean": 100.0, "response_length/mean": 300.0, "response_length/max": 1024.0}


def verl_step(at: int, scale: float = 1.0, /, **timers: float) -> dict[str, float]:
    """The flat metrics of one step: 64 completions on 8 GPUs; `timers` in place of the usual ones where given."""
    seconds = {key: scale * spent for key, spent in (timers or TIMED).items()}
    whole = seconds.pop("step", None) or sum(seconds.values()) + 0.05 * scale
    tokens = 64 * (LENGTHS["prompt_length/mean"] + LENGTHS["response_length/mean"])
    return {
        "actor/pg_loss": 0.01 * at, "training/global_step": at, **LENGTHS, "response_length/clip_ratio": 0.25,
        "critic/score/mean": 0.4, **{f"timing_s/{key}": spent for key, spent in seconds.items()},
        "timing_s/step": whole, "perf/total_num_tokens": tokens, "perf/time_per_step": whole,
        "perf/throughput": tokens / (whole * 8),
    }  # fmt: skip


def verl_line(step: int, metrics: Mapping[str, float], *, digits: int | None = None) -> str:
    """verl's line of the console: three decimals in 2025 (`digits`), whole numbers of Python later."""
    words = {key: repr(value) if digits is None else f"{value:.{digits}f}" for key, value in metrics.items()}
    return " - ".join([f"step:{step}", *(f"{key}:{word}" for key, word in words.items())])


def in_ray(line: str, pid: int = 4711) -> str:
    """A line as Ray prints it for a worker, in colour."""
    return f"\x1b[36m(TaskRunner pid={pid})\x1b[0m {line}"


def wrapped(line: str, width: int) -> str:
    """A line as a terminal of `width` columns breaks it, in mid word."""
    return "\n".join(line[at : at + width] for at in range(0, len(line), width))


def jsonl(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def nested(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Keys with `/` as mappings inside each other, as EasyR1 writes them."""
    tree: dict[str, Any] = {}
    for key, value in metrics.items():
        *above, name = key.split("/")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
    return tree


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV with a column for every key of the rows."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
