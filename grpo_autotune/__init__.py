"""Measure and train TRL's GRPO: where each second of an optimizer step goes, and what to do about it.

`attach(trainer)` measures any `trl.GRPOTrainer`, `speed_up(trainer)` makes its steps faster, `unlock_vllm()` mends and
tunes its rollout engine, `load_config(path)` reads a configuration, `load_run(folder)` a stored report. They load on
first use, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_autotune.commands.page import load_run
    from grpo_autotune.config.schema import load_config
    from grpo_autotune.plugin import attach
    from grpo_autotune.rollout.colocate.unlock import unlock_vllm
    from grpo_autotune.speedups.install import speed_up

_HOMES = {
    "attach": "grpo_autotune.plugin",
    "load_config": "grpo_autotune.config.schema",
    "load_run": "grpo_autotune.commands.page",
    "speed_up": "grpo_autotune.speedups.install",
    "unlock_vllm": "grpo_autotune.rollout.colocate.unlock",
}

__all__ = ["attach", "load_config", "load_run", "speed_up", "unlock_vllm"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
