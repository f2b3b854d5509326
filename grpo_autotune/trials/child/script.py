"""A trial of a user's TRL script: its `GRPOConfig` takes the trial's values, and its first `train()` is measured.

The script ends where its first training would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grpo_autotune.console import say
from grpo_autotune.errors import ConfigError
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.trial import TRIAL_ARGUMENTS, TrialSpec
from grpo_autotune.scripts.hooks import EnoughSteps, ScriptHooks, run_as_main
from grpo_autotune.scripts.values import ScriptValues
from grpo_autotune.trials.child.collectives import collective_limit
from grpo_autotune.trials.heartbeat import HeartbeatWriter

if TYPE_CHECKING:
    from grpo_autotune.trials.child.measure import Measurement


def run_script(
    spec: TrialSpec, folder: Path, startup: Startup, heartbeat: HeartbeatWriter, trl_imported: Callable[[], None]
) -> Measurement:
    """Run `spec.script` as `python script arguments...` would, up to the end of its first training. `startup` gets the
    phases `script`, `model`, `engine` and `trainer`; `trl_imported` is called once TRL's trainer was imported, before
    any model is there. ConfigError where there is no such script, it trains nothing, or TRL has no such key or refuses
    its value; RewardError where a reward function raised; and whatever the script raises."""
    path, *arguments = spec.script or [""]
    trial = _ScriptTrial(spec, folder, startup, heartbeat, trl_imported)
    try:
        run_as_main(Path(path), arguments, trial)
    except SystemExit as end:
        if trial.measured is None and end.code not in (None, 0):
            raise ConfigError(f"the script ended with {end.code!r} before it trained", where=path) from end
    if trial.measured is None:
        raise ConfigError("the script trained no GRPOTrainer", where=path, fix="Call train() of a GRPOTrainer in it.")
    return trial.measured


class _ScriptTrial(ScriptHooks):
    """The measurement of a script's first training."""

    def __init__(
        self,
        spec: TrialSpec,
        folder: Path,
        startup: Startup,
        heartbeat: HeartbeatWriter,
        trl_imported: Callable[[], None],
    ) -> None:
        limits = collective_limit(spec)
        super().__init__(ScriptValues(spec.knobs, {**TRIAL_ARGUMENTS, **limits}), startup, say)
        self._spec, self._folder, self._heartbeat, self._trl_imported = spec, folder, heartbeat, trl_imported
        self.measured: Measurement | None = None

    def on_trainer_module(self, module: ModuleType) -> None:
        self._trl_imported()
        super().on_trainer_module(module)

    def train(self, trainer: Any, train: Callable[[], Any]) -> Any:
        from grpo_autotune.train.rewards.guard import blame_rewards
        from grpo_autotune.trials.child.measure import measure

        blame_rewards(trainer)
        self.measured = measure(trainer, self._spec, self._folder, self.startup, self._heartbeat, train)
        raise EnoughSteps
