"""The table of a run's checks, and what makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from grpo_autotune.console import as_warning
from grpo_autotune.doctor import inputs, surroundings
from grpo_autotune.doctor.finding import Finding
from grpo_autotune.doctor.run import Run
from grpo_autotune.errors import AutotuneError

Cost = Literal["cheap", "slow"]
Look = Callable[[Run], Iterable[Finding]]


class Check(NamedTuple):
    """A row of the table."""

    name: str
    cost: Cost  # `train`, `probe` and `search` make the cheap ones, too
    look: Look


def _rows(cost: Cost, *looks: Look) -> list[Check]:
    return [Check(look.__name__.replace("_", " "), cost, look) for look in looks]


CHECKS = (
    *_rows("cheap", inputs.weights, inputs.sampling, surroundings.room, surroundings.disk, surroundings.clock),
    *_rows("cheap", surroundings.loader, surroundings.launcher, surroundings.ports, surroundings.keys),
    *_rows("cheap", surroundings.trackers, surroundings.busy),
    *_rows("slow", inputs.data, inputs.answers, inputs.tokenizer, inputs.template, inputs.system_role),
    *_rows("slow", inputs.answer_turn, inputs.end_tokens, surroundings.disk_speed, surroundings.endpoints),
)


def examine(run: Run, table: Iterable[Check] = CHECKS) -> Iterator[Finding]:
    """Make the checks. One that breaks is told in a line; what several stumble over is told by the first, and that all
    is well where there is nothing else to tell."""
    told = set[str]()
    for row in table:
        findings: list[Finding] = []
        with as_warning(f"the check `{row.name}` was not made"):
            try:
                findings += row.look(run)
            except AutotuneError as error:
                error.where, error.what = run.renumbered(error.where or ""), run.renumbered(error.what)
                detail = f"{error.where}: {error.what}".removeprefix(": ")
                findings = [Finding("", "fail", detail, error.fix or "see docs/troubleshooting.md", error)]
        for one in [finding for finding in findings if finding.status != "ok"] or findings:
            if one.detail not in told:
                yield replace(one, check=one.check or row.name)
            told.add(one.detail)
