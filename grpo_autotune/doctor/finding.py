"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str  # name of the package or part of the machine
    status: Status  # "ok"; "warn": something will be slower or is missing for some uses; "fail": training cannot work
    detail: str  # version, size or setting, and what is wrong with it
    remedy: str = ""  # what to do; empty where nothing has to be done
