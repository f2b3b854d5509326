"""A trainer for a trial: the user's configuration, without what would outlive the trial (checkpoints, trackers)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.probe.startup import Startup
from grpo_autotune.seams.import_hooks import ENGINE_MODULE, after_import, hook_imports
from grpo_autotune.seams.layers import AttributeSlot, Handle, wrap

if TYPE_CHECKING:
    from grpo_autotune.train.data.datasets import LoadData

Say = Callable[[str], None]

TRIAL = {
    "save_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "logging_strategy": "steps",
    "logging_steps": 1,
}


def quiet_trainer(
    config: RunConfig,
    startup: Startup,
    say: Say,
    load: LoadData | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Build the trainer of `config` with its start-up booked to `startup`; nothing of it is saved.

    Args:
        config: The run.
        startup: Gets the phases.
        say: Takes lines of progress.
        load: Reads the data; None reads it as training does.
        overrides: `GRPOConfig` keys that take precedence.

    Raises:
        AutotuneError: As `train.trainer.build_trainer`.
    """
    from grpo_autotune.train.data.datasets import load_data
    from grpo_autotune.train.trainer import build_trainer

    with EngineTime(startup):
        return build_trainer(
            config,
            phase=startup.phase,
            grpo_overrides={**TRIAL, **(overrides or {})},
            say=say,
            load=load_data if load is None else load,
        )


class EngineTime:
    """While entered, books the start of TRL's vLLM engine to the phase `engine`."""

    def __init__(self, startup: Startup) -> None:
        self._startup = startup
        self._handles: list[Handle] = []

    def __enter__(self) -> None:
        self._finder = hook_imports({ENGINE_MODULE: after_import(self._imported)})

    def __exit__(self, *exc: object) -> None:
        sys.meta_path.remove(self._finder)
        for handle in self._handles:
            handle.remove()

    def _imported(self, module: ModuleType) -> None:
        self._handles.append(wrap(AttributeSlot(module.VLLMGeneration, "__init__"), self._engine))

    def _engine(self, call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with self._startup.phase("engine"):
            return call_next(*args, **kwargs)
