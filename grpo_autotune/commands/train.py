"""`grpo-autotune train`: train a configuration, show its progress, and in the end where time went."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.commands.ladder import Ladder
from grpo_autotune.commands.page import keep_page
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import Heartbeat, as_warning, is_first_rank, say, warn
from grpo_autotune.files import full_disk_told
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.device import runtime_facts
from grpo_autotune.hardware.device_memory import expand_segments
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.probe.startup import Startup
from grpo_autotune.records.probe import SAVES_NOTHING
from grpo_autotune.report.create import report_of
from grpo_autotune.report.files import save_report
from grpo_autotune.rollout.server.own import own_server
from grpo_autotune.rollout.server.process import leave_gpus
from grpo_autotune.runs.folder import RunFolder
from grpo_autotune.runs.kept_batch import other_batch, with_kept_batch
from grpo_autotune.trained.serving import served_weights
from grpo_autotune.units import percent, seconds

LARGEST = 3


def train_config(config: RunConfig, *, out_dir: Path, resume: bool) -> int:
    """Train in `out_dir` until the end, or until a signal; returns the exit code (0, or 128 + the signal).

    Raises:
        AutotuneError: As `train.trainer.run_training` and `commands.ladder.Ladder`.
    """
    ladder = Ladder(config, out_dir, resume=resume)
    config = with_kept_batch(ladder.config, RunFolder(out_dir), say) if resume else ladder.config
    startup, live = Startup(), LiveFile(out_dir)
    watched: list[Callable[[], str | None]] = [startup.now]
    probes: list[Any] = []
    set_environment()
    gpus = leave_gpus(config)
    with ExitStack() as ended, full_disk_told(out_dir), Heartbeat(lambda: watched[-1]()):
        with startup.imports():
            expand_segments(os.environ)
            mend_torchvision()
            from grpo_autotune.probe.probe import Probe
            from grpo_autotune.probe.trainer_facts import trained_rows
            from grpo_autotune.train.runs.callbacks import AfterLog
            from grpo_autotune.train.runs.receipt_check import SpeedWatch, differences, set_up_otherwise
            from grpo_autotune.train.trainer import run_training
            from grpo_autotune.train.trial_trainer import engine_time
        for sentence in differences(config.receipt, detect()) if config.receipt else ():
            warn(sentence)
        if config.receipt and not resume and (told := other_batch(config, config.receipt.processes)):
            warn(told)

        def prepare(trainer: Any) -> None:
            ladder.begin(trainer)
            runtime = runtime_facts(trainer.args.device)
            for sentence in set_up_otherwise(config.receipt, runtime) if config.receipt else ():
                warn(sentence)
            if config.receipt:
                trainer.add_callback(SpeedWatch(config.receipt, warn, partial(trained_rows, trainer)))
            kept = config.monitors.nothing_learned is None  # else the monitor tells it
            tell = warn if kept else lambda sentence: warn(sentence) if sentence == SAVES_NOTHING else None
            probes.append(Probe(trainer, startup=startup, out_dir=out_dir, say=tell, live=live))
            watched.append(lambda: trainer.monitors.stall.look(probes[0].locate()) or probes[0].now())
            trainer.add_callback(AfterLog(partial(keep_page, out_dir, running=True)))
            ended.callback(keep_page, out_dir)  # however it ends, and last
            ended.callback(_tell_time, probes[0], config, out_dir)

        server = own_server(config, served_weights, gpus, out_dir, startup.phase)
        with ladder, server as overrides, engine_time(startup):
            startup.tell = live.starting  # its phases begin once the folder was judged: no other run's state is lost
            result = run_training(
                config, out_dir, resume, phase=startup.phase, prepare=prepare, grpo_overrides=overrides
            )
        say(result.line())
    if result.signum:  # the first one to end would have torchrun end those that write their report
        probes[0].trainer.accelerator.wait_for_everyone()
    return result.exit_code


@as_warning("no report")
def _tell_time(probe: Any, config: RunConfig, out_dir: Path) -> None:
    probe.detach()
    record = probe.record()
    if not (is_first_rank() and record.timings.step_s):
        return
    told = {**probe.trainer.monitors.report(), "evaluations": probe.trainer.evaluations.table()}
    report = report_of(record, config).model_copy(update=told)
    largest = sorted(report.stages, key=lambda stage: -stage.share)[:LARGEST]
    shares = ", ".join(f"{stage.name} {percent(stage.share)}" for stage in largest)
    line = f"{seconds(report.step_s)} per step: {shares}"
    with as_warning("the report was not saved"):
        save_report(report, out_dir)
        line += f"; `grpo-autotune report {out_dir}` prints the whole breakdown"
    say(line)
    if report.others is not None and report.others.matters:
        warn(f"meanwhile {report.others.warning}")
