"""A trainer for a trial: the user's configuration, without what would outlive the trial (checkpoints, trackers)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from grpo_autotune.commands.console import say
from grpo_autotune.commands.run import ENGINE_MODULE, after_import, hook_imports
from grpo_autotune.config import RunConfig
from grpo_autotune.probe.startup import Startup
from grpo_autotune.seams.layers import AttributeSlot, wrap

TRIAL = {
    "save_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "logging_strategy": "steps",
    "logging_steps": 1,
}


def quiet_trainer(config: RunConfig, startup: Startup) -> Any:
    """Build the trainer of `config` with its start-up booked to `startup`; nothing of it is saved.

    Raises:
        AutotuneError: As `train.trainer.build_trainer`.
    """
    time_engine_start(startup)
    from grpo_autotune.train.trainer import build_trainer

    return build_trainer(config, phase=startup.phase, grpo_overrides=TRIAL, say=say)


def time_engine_start(startup: Startup) -> None:
    """Book the start of TRL's vLLM engine to the phase `engine`."""

    def engine(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with startup.phase("engine"):
            return call_next(*args, **kwargs)

    def imported(module: ModuleType) -> None:
        wrap(AttributeSlot(module.VLLMGeneration, "__init__"), engine)

    hook_imports({ENGINE_MODULE: after_import(imported)})
