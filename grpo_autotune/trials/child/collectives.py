"""Limits of collectives in a trial of several ranks: one that never ends is an error with a message in the log.

A rank that waits shows no sign of life while another judges or compiles, so that silence says nothing there.
"""

import os
from typing import Any

from grpo_autotune.records.trial import TrialSpec

SHARE = 0.5
"""Of a trial's limit: a collective that starts to hang in its first half ends it before the limit does."""


def collective_limit(spec: TrialSpec, asked_s: Any = None) -> dict[str, int]:
    """The `GRPOConfig` keys of a trial's ranks, and the limit of NCCL's watchdog put into this process's environment.
    The `ddp_timeout` of its configuration, `asked_s` in seconds, counts where it is shorter; None is the default."""
    if spec.world_size == 1:
        return {}
    limit_s = max(1, int(SHARE * spec.limit_s))
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(limit_s))  # 480 otherwise
    return {"ddp_timeout": limit_s if asked_s is None else min(limit_s, int(asked_s))}
