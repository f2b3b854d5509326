"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the package or part of the machine.
        status: "ok"; "warn": something will be slower or is missing for some uses; "fail": training cannot work.
        detail: Version, size or setting, and what is wrong with it.
        remedy: What to do; empty where nothing has to be done.
    """

    check: str
    status: Status
    detail: str
    remedy: str = ""
