"""`grpo-autotune doctor`: every finding of the checks with its remedy, and the cheap ones before other commands."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_autotune.commands.early import check_early
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import Heartbeat, is_first_rank, say, show, warn
from grpo_autotune.doctor.checks import run_checks
from grpo_autotune.doctor.finding import Findings, told
from grpo_autotune.doctor.inputs import answers, data, lengths, sampling, template, tokenizer, weights
from grpo_autotune.doctor.run import Run, examine
from grpo_autotune.doctor.surroundings import accounts, busy, disk, disk_speed, endpoints, launcher, loader, room
from grpo_autotune.errors import LONGEST, ConfigError, EnvironmentProblem, shortened
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.places import THREADS
from grpo_autotune.units import plural

CHEAP = (weights, sampling, room, disk, loader, launcher, accounts, busy)  # those that take milliseconds
SLOW = (data, answers, tokenizer, template, lengths, disk_speed, endpoints)
SHOWN = ("check", "status", "detail", "remedy")


def show_findings(load: Callable[[], RunConfig] | None, *, as_json: bool) -> int:
    """Print the findings on this machine and, where there is one to `load`, on a configuration; returns 3 when one of
    them stops training, else 0. A configuration that cannot be loaded is a finding, too."""
    findings = run_checks()
    try:
        run = Run(load(), detect()) if load is not None else None
    except ConfigError as error:
        run = None
        findings.append(told(error, configuration.__name__))
    if run is not None:
        with Heartbeat(run.now):
            findings += examine(run, (configuration, *SLOW, *CHEAP))
    rows = [{name: str(getattr(finding, name)).strip() for name in SHOWN} for finding in findings]
    if as_json:
        show(json.dumps({"findings": rows}, indent=2))
    else:
        table = Table("check", "status", "found", "what to do", show_lines=False)
        for row in rows:
            table.add_row(*(Text(cell, overflow="fold") for cell in row.values()))
        if is_first_rank():
            Console().print(table)
    states = [finding.status for finding in findings]
    say(f"{len(states)} checks: {plural(states.count('warn'), 'warning')}, {plural(states.count('fail'), 'failure')}")
    return 3 if "fail" in states else 0


def configuration(run: Run) -> Findings:
    """Names, files, splits and packages that the configuration asks for are there."""
    check_early(run.config, {})
    yield from ()


def preflight(config: RunConfig, overrides: Mapping[str, Any]) -> None:
    """Make the cheap checks before a run with these `GRPOConfig` keys put in place: a line for each warning, and the
    error of what failed, an `EnvironmentProblem` where that is nothing in the configuration. Where other processes keep
    cores busy, torch gets fewer threads in this process and its children: a thread on a core that is shared has all
    others wait for its next slice of time, at each operation."""
    check_early(config, overrides)
    config = config.model_copy(update={"grpo": {**config.grpo, **overrides}})
    run = Run(config, detect())
    for finding in examine(run, CHEAP):
        if finding.status == "fail":
            raise finding.error or EnvironmentProblem(finding.detail, where=finding.check, fix=f"{finding.remedy}.")
        if finding.status == "warn":
            warn(shortened(f"{finding.check}: {finding.detail}; {finding.remedy}", LONGEST))
    if run.threads is not None:
        os.environ[THREADS] = str(run.threads)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(min(run.threads, torch.get_num_threads()))
