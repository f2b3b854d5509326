"""The result of a check."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from grpo_autotune.errors import AutotuneError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str  # name of the check, the package or the part of the machine
    status: Status  # "ok"; "warn": something will be slower or is missing for some uses; "fail": training cannot work
    detail: str  # version, size or setting, and what is wrong with it
    remedy: str = ""  # what to do; empty where nothing has to be done
    error: AutotuneError | None = field(default=None, compare=False)  # the one with which a command ends


Findings = Iterator[Finding]
ok, warn, fail = (partial(Finding, "", status) for status in ("ok", "warn", "fail"))  # named by the table's row


def told(error: AutotuneError, check: str = "") -> Finding:
    """The failure that an error of this package tells."""
    detail = f"{error.where}: {error.what}" if error.where else error.what
    return Finding(check, "fail", detail, error.fix or "see docs/troubleshooting.md", error)
