"""The monitors on a trainer: each line of its log goes through the rules, and all ranks take the same action."""

import importlib
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.config.sections.branches import start_weights
from grpo_autotune.console import as_warning, complain, is_first_rank, say
from grpo_autotune.errors import ConfigError
from grpo_autotune.files import write_whole
from grpo_autotune.records.alerts import ALERTS_FILE, Alert, load_alerts, outcome
from grpo_autotune.registry import resolve
from grpo_autotune.train.monitors.rules import Run
from grpo_autotune.train.monitors.watch import StallWatch, Watch
from grpo_autotune.train.rewards import builtin, from_trl
from grpo_autotune.train.runs.callbacks import TrainLog
from grpo_autotune.units import listing

WEIGHTS = {"tell": 0, "skip_step": 0, "checkpoint": 1, "stop": 2}  # of actions at a log event: the heaviest is taken
COMMAND_S, TOO_LONG = 30.0, 124  # seconds that a command may take, and the status of `timeout` for one that did


def run_of(config: RunConfig) -> Run:
    """The run of a configuration, of which nothing was logged yet; no built-in reward is above 1."""
    grpo, modules = config.grpo, {resolve("reward", item.name).__module__ for item in config.rewards}
    highest = sum(max(0.0, one.weight) for one in config.rewards) * (modules <= {builtin.__name__, from_trl.__name__})
    beta, bands = grpo.get("beta") or 0.0, {}
    if config.branches is not None:
        beta = max(start_weights(config.branches, grpo).values())
        bands = {name: branch.kl_band for name, branch in config.branches.by_name.items() if branch.kl_band}
    return Run(beta, bool(grpo.get("mask_truncated_completions")), highest, bands)


class Monitors(TrainerCallback):  # type: ignore[misc]
    """The monitors of `trainer`, a `ResumableTrainer`, over the lines of `log`, those of before a resume included; a
    `ConfigError` where steps shall be left out that cannot be."""

    def __init__(self, trainer: Any, config: RunConfig, folder: Path, log: TrainLog, *, resumes: bool) -> None:
        self.watch, self.is_stopped = Watch(config.monitors.items_on(), run_of(config)), False
        self._trainer, self._log, self._folder, self._command = trainer, log, folder, config.monitors.command
        actions = {getattr(item, "action", "tell") for item in self.watch.items.values()}
        self._acts, self._skips = any(WEIGHTS[action] for action in actions), "skip_step" in actions
        if self._skips and (trainer.is_deepspeed_enabled or not trainer.args.max_grad_norm):
            what, where = "under DeepSpeed, or without grpo.max_grad_norm, no step can be left out", "loss_spike.action"
            raise ConfigError(what, where=f"monitors.{where}", fix="Use tell, checkpoint or stop.")
        self.stall = StallWatch(trainer, self.watch.items.get("stall"), folder, lambda alert: self._tell([alert]))
        self._commands = ThreadPoolExecutor(1)
        earlier = load_alerts(folder) if resumes else []
        if is_first_rank() and (folder / ALERTS_FILE).exists():  # without a torn line, or one of another run
            write_whole(folder / ALERTS_FILE, "".join(f"{alert.model_dump_json()}\n" for alert in earlier))
        self.watch.told |= {(alert.monitor, alert.metric): alert.step for alert in earlier}
        for row in log.earlier if is_first_rank() else ():
            self._tell(self.watch.see(row))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        alerts: list[Alert] = []
        with as_warning("monitors"):
            alerts += self.watch.see(self._log.row) if self._log.row and is_first_rank() else []
            self._tell(alerts)
        weight = max((WEIGHTS[alert.action] for alert in alerts), default=0)
        if self._acts:
            weight = int(self._trainer.largest(float(weight))[0])
        self.is_stopped = self.is_stopped or weight == WEIGHTS["stop"]
        control.should_save = control.should_save or weight > 0
        control.should_training_stop = control.should_training_stop or self.is_stopped

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._skips:
            row, item = {"grad_norm": float(self._trainer.grad_norm)}, self.watch.items["loss_spike"]
            readings = list(self.watch.run.loss_spike(row, item)) if is_first_rank() else []
            if self._trainer.largest(float(any(reading.bad for reading in readings)))[0]:
                model.zero_grad(set_to_none=True)  # the optimizer leaves a parameter without a gradient alone
            for reading in readings:
                self._tell(self.watch.take("loss_spike", reading, state.global_step + 1))

    def report(self) -> dict[str, Any]:
        """Keys of a report: the number of `monitors`, and the `alerts` of the whole run."""
        return {"monitors": len(self.watch.items), "alerts": load_alerts(self._folder)}

    def close(self) -> None:
        """Wait for commands under way, and say how many monitors fired, and which had nothing to read."""
        self._commands.shutdown()
        unread = [name for name in self.watch.items if name not in {"stall", *(name for name, _ in self.watch.read)}]
        if self.watch.items and self.watch.run.step:
            say(outcome(**self.report()) + (f"; nothing to read for {listing(unread)}" if unread else ""))

    def _tell(self, alerts: Iterable[Alert]) -> None:
        """Tell alerts, from any thread."""
        for told in alerts:
            alert, path = told.model_copy(update={"run": str(self._folder)}), self._folder / ALERTS_FILE
            complain(f"warning: {alert.line()}", everywhere=True)
            with as_warning("the alert was not written"), path.open("a", encoding="utf-8") as file:
                file.write(alert.model_dump_json() + "\n")
            for name in {"wandb", "trackio"} & set(self._trainer.args.report_to) if is_first_rank() else ():
                with as_warning(f"{name} was not told"):
                    module = importlib.import_module(name)
                    (module.run if name == "wandb" else module).alert(title=alert.name, text=alert.line())
            if self._command is not None and is_first_rank():
                self._commands.submit(self._run, self._command, f"{alert.model_dump_json()}\n".encode())

    @as_warning("monitors.command")
    def _run(self, command: str, text: bytes) -> None:
        if self._command is None:  # an earlier one took too long
            return
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        words = ["timeout", "-k1", f"{COMMAND_S}", "sh", "-c", command]  # ends children as well
        done = subprocess.run(words, input=text, check=False, **quiet)
        if done.returncode == TOO_LONG:
            self._command = None
            raise TimeoutError(f"it took more than {COMMAND_S:g} s, and will not be run again")
        done.check_returncode()
