"""`grpo-autotune probe`: a short real trial of a configuration, and where its seconds went."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grpo_autotune.commands.imports import mend_torchvision, served_weights
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import INTERRUPTED_EXIT, is_first_rank, say
from grpo_autotune.probe.startup import Heartbeat, Startup
from grpo_autotune.records.report import Report
from grpo_autotune.report.create import report_of
from grpo_autotune.rollout.server.own import own_server
from grpo_autotune.rollout.server.process import leave_gpus


def probe_config(config: RunConfig, *, steps: int, out_dir: Path) -> tuple[Report, int]:
    """Train `config` for a warm-up and `steps` measured optimizer steps, and report; nothing of the training is kept.

    Returns:
        The report, and the exit code: 0, or 130 where Ctrl-C ended the trial early.

    Raises:
        AutotuneError: The configuration, the data, a reward or this machine stood in the way.
    """
    startup, code = Startup(), 0
    watched: list[Callable[[], str | None]] = [startup.now]
    gpus = leave_gpus(config)
    with Heartbeat(lambda: watched[-1](), say):
        with startup.phase("import"):
            mend_torchvision()
            from grpo_autotune.probe.probe import Probe
            from grpo_autotune.train.runs.stop_after import StopAfter
            from grpo_autotune.train.trial_trainer import quiet_trainer
        startup.since_birth("import")
        with own_server(config, served_weights, gpus, out_dir, startup.phase) as found:
            trainer = quiet_trainer(config, startup, say, overrides=found)
            probe = Probe(trainer, startup=startup, out_dir=out_dir)
            watched.append(probe.now)
            total = probe.warmup + -(-steps // probe.cycle) * probe.cycle
            progress = _Progress(total, probe.warmup)
            trainer.add_callback(StopAfter(total, progress))
            try:
                trainer.train()
            except KeyboardInterrupt:
                if probe.closed <= probe.warmup:
                    raise
                code = INTERRUPTED_EXIT
                say("stopped by Ctrl-C: this is what was measured until then")
            finally:
                progress.close()
                watched.pop()
                probe.detach()
    return report_of(probe.record(), config.model_dump(mode="json"), out_dir), code


class _Progress:
    """A bar on a terminal, a line a step elsewhere; both with the time left."""

    def __init__(self, total: int, warmup: int) -> None:
        self._total, self._warmup = total, warmup
        self._begun = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal and is_first_rank():
            columns = (TextColumn("probing"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()

    def __call__(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            return
        seconds = (time.monotonic() - self._begun) / done
        kind = "warm-up" if done <= self._warmup else "measured"
        say(f"step {done} of {self._total} ({kind}), about {(self._total - done) * seconds:.0f} s left")

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
