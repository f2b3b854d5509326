"""`grpo-autotune probe`: a short real trial of a configuration, and a report of where its seconds went."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from grpo_autotune.commands.imports import mend_torchvision, served_weights, set_environment
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import INTERRUPTED_EXIT, Heartbeat, ProgressBar, say
from grpo_autotune.hardware.device_memory import expand_segments
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.report import Report
from grpo_autotune.report.create import report_of
from grpo_autotune.rollout.server.own import own_server
from grpo_autotune.rollout.server.process import leave_gpus


def probe_config(config: RunConfig, *, steps: int, out_dir: Path) -> tuple[Report, int]:
    """Train `config` for a warm-up and `steps` measured optimizer steps, and report; nothing of the training is kept.

    Returns:
        The report, and the exit code: 0, or 130 where Ctrl-C ended the trial early.

    Raises:
        AutotuneError: The configuration, the data, a reward function or this machine cannot be used.
    """
    startup, code = Startup(), 0
    watched: list[Callable[[], str | None]] = [startup.now]
    set_environment()
    gpus = leave_gpus(config)
    with Heartbeat(lambda: watched[-1]()):
        with startup.imports():
            expand_segments(os.environ)
            mend_torchvision()
            from grpo_autotune.probe.probe import Probe
            from grpo_autotune.train.runs.stop_after import StopAfter
            from grpo_autotune.train.trial_trainer import quiet_trainer
        with own_server(config, served_weights, gpus, out_dir, startup.phase) as overrides:
            trainer = quiet_trainer(config, startup, say, overrides=overrides, out_dir=out_dir)
            probe = Probe(trainer, startup=startup, out_dir=out_dir, profile=True)
            watched.append(probe.now)
            total = probe.warmup + -(-steps // probe.cycle) * probe.cycle
            with ProgressBar("probing", total) as bar:
                trainer.add_callback(StopAfter(total, partial(_tell, bar, total, probe.warmup)))
                try:
                    trainer.train()
                except KeyboardInterrupt:
                    if probe.closed <= probe.warmup:
                        raise
                    code = INTERRUPTED_EXIT
                    say("stopped by Ctrl-C: this is what was measured until then")
                finally:
                    watched.pop()
                    probe.detach()
    return report_of(probe.record(), config, out_dir), code


def _tell(bar: ProgressBar, total: int, warmup: int, done: int) -> None:
    left, kind = bar.time_left(done), "warm-up" if done <= warmup else "measured"
    bar.update(done, left, f"step {done} of {total} ({kind}), {left}")
