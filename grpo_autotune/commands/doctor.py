"""`grpo-autotune doctor`: every finding of the checks with its remedy."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from rich.table import Table

from grpo_autotune.console import show
from grpo_autotune.doctor.checks import run_checks


def show_findings(*, as_json: bool) -> int:
    """Print the findings; returns 3 when one of them stops training, else 0."""
    findings = run_checks()
    if as_json:
        show(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        table = Table("check", "status", "found", "what to do", show_lines=False)
        for finding in findings:
            table.add_row(finding.check, finding.status, finding.detail, finding.remedy)
        Console().print(table)
    return 3 if any(finding.status == "fail" for finding in findings) else 0
