"""`grpo-autotune doctor`: every finding of the checks with its remedy, and the cheap ones before other commands."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_autotune.commands.early import check_early
from grpo_autotune.config.batch import world_size
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import show, warn
from grpo_autotune.doctor.checks import run_checks
from grpo_autotune.doctor.run import Run
from grpo_autotune.doctor.table import CHECKS, Check, examine
from grpo_autotune.errors import LONGEST, EnvironmentProblem, shortened
from grpo_autotune.hardware import detect
from grpo_autotune.probe.sampler import others_s

SHOWN = ("check", "status", "detail", "remedy")


def show_findings(config: RunConfig | None, *, as_json: bool) -> int:
    """Print the findings on this machine and, where there is one, on a configuration; returns 3 when one of them stops
    training, else 0."""
    begun, findings = look(), run_checks()
    if config is not None:
        loads = Check("configuration", "cheap", lambda run: check_early(run.config, {}) or ())
        findings += examine(Run(config, detect(), {}, begun), (loads, *CHECKS))
    rows = [[str(getattr(finding, name)) for name in SHOWN] for finding in findings]
    if as_json:
        show(json.dumps({"findings": [dict(zip(SHOWN, row, strict=True)) for row in rows]}, indent=2))
    else:
        table = Table("check", "status", "found", "what to do", show_lines=False)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    return 3 if any(finding.status == "fail" for finding in findings) else 0


def look() -> tuple[float, float]:
    """A first look at what other processes take of the machine, which a check measures from here on."""
    return others_s(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))


def preflight(config: RunConfig, overrides: Mapping[str, Any], begun: tuple[float, float]) -> None:
    """Make the cheap checks before a run: a line for each warning.

    Raises:
        AutotuneError: A check failed; an `EnvironmentProblem` where it is nothing in the configuration.
    """
    run = Run(config, detect(), overrides, begun)
    for finding in examine(run, [row for row in CHECKS if row.cost == "cheap"]):
        if finding.status == "fail":
            raise finding.error or EnvironmentProblem(finding.detail, where=finding.check, fix=f"{finding.remedy}.")
        if finding.status == "warn":
            warn(shortened(f"{finding.check}: {finding.detail}; {finding.remedy}", LONGEST))
