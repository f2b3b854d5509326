"""The trainer of a trial or a probe: the user's configuration without checkpoints, trackers and uploads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.probe.startup import Startup, timed
from grpo_autotune.records.trial import TRIAL_ARGUMENTS
from grpo_autotune.seams.import_hooks import ENGINE_MODULE, after_import, hook_imports
from grpo_autotune.seams.layers import AttributeSlot, Handle, take_off, wrap

if TYPE_CHECKING:
    from grpo_autotune.train.data.datasets import LoadData

Say = Callable[[str], None]


def quiet_trainer(
    config: RunConfig,
    startup: Startup,
    say: Say,
    load: LoadData | None = None,
    overrides: Mapping[str, Any] | None = None,
    out_dir: Path | None = None,
) -> Any:
    """Build the trainer of `config` as training does, but for a measurement: it saves, uploads and reports nothing.
    `startup` gets the seconds of each phase, `load` reads the data, `overrides` are `GRPOConfig` keys that take
    precedence, and `out_dir` is the trainer's `output_dir`. Raises as `train.trainer.build_trainer`."""
    from grpo_autotune.train.data.datasets import load_data
    from grpo_autotune.train.trainer import build_trainer

    folder = {} if out_dir is None else {"output_dir": str(out_dir)}
    with engine_time(startup):
        return build_trainer(
            config,
            phase=startup.phase,
            grpo_overrides={**TRIAL_ARGUMENTS, **folder, **(overrides or {})},
            say=say,
            load=load_data if load is None else load,
        )


@contextmanager
def engine_time(startup: Startup) -> Iterator[None]:
    """Count the start of TRL's vLLM engine as the phase `engine`, while entered."""
    handles: list[Handle] = []

    def imported(module: ModuleType) -> None:
        handles.append(wrap(AttributeSlot(module.VLLMGeneration, "__init__"), timed(startup.phase, "engine")))

    finder = hook_imports({ENGINE_MODULE: after_import(imported)})
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        take_off(handles)
