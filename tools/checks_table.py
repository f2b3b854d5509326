"""The table of `doctor`'s checks: of the machine by what they find, of a run by their functions."""

from __future__ import annotations

from grpo_autotune.commands.doctor import CHEAP, SLOW, configuration
from grpo_autotune.doctor import checks, gpus
from grpo_autotune.hardware.versions import PACKAGES

MACHINE = (
    ("torch", checks.check_torch),
    ("torchvision", checks.check_torchvision),
    (", ".join(row.distribution for row in PACKAGES), checks.check_package),
    ("gpu", gpus.check_gpus),
    ("gpu memory, gpu clocks, gpu driver, gpu errors, gpu links", gpus.check_health),
    ("gpu runtime, addresses, processes", gpus.check_setting),
    ("memory", checks.check_memory),
    ("threads", checks.check_threads),
    ("cache", checks.check_cache),
    ("shared memory", checks.check_shared_memory),
    ("hub", checks.check_hub),
)
RUN = (configuration, *SLOW, *CHEAP)


def table() -> str:
    """A row for each check: its name, who makes it, and what it looks at."""
    rows = [(name, "`doctor`", check.__doc__) for name, check in MACHINE]
    every = "`train`, `probe`, `search`, `doctor CONFIG`"
    rows += [
        (
            check.__name__.replace("_", " "),
            every if check in (configuration, *CHEAP) else "`doctor CONFIG`",
            check.__doc__,
        )
        for check in RUN
    ]
    lines = [f"| {name} | {made} | {' '.join((what or '').split())} |" for name, made, what in rows]
    return "\n".join(["| check | made by | what is as it should be |", "|---|---|---|", *lines, ""])
