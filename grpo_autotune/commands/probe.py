"""`grpo-autotune probe`: a short real trial of a configuration, and a report of where its seconds went."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import Heartbeat, ProgressBar, as_warning, say
from grpo_autotune.files import full_disk_told
from grpo_autotune.hardware.device_memory import expand_segments
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.probe.startup import Startup
from grpo_autotune.report.create import report_of
from grpo_autotune.rollout.server.own import own_server
from grpo_autotune.rollout.server.process import leave_gpus
from grpo_autotune.trained.serving import served_weights


def probe_config(
    config: RunConfig,
    *,
    steps: int,
    out_dir: Path,
    output: AbstractContextManager[None],
    show: Callable[..., None],
    with_eval: bool = False,
) -> None:
    """Train `config` for a warm-up and `steps` measured optimizer steps; nothing of the training is kept.

    `show` is given the report, that of the steps so far where something ends the training early; `output` is held until
    then, to lead standard output elsewhere. `with_eval` times one evaluation and one checkpoint after the steps.
    AutotuneError where the configuration, the data, a reward function or this machine cannot be used."""
    probes: list[Any] = []
    try:
        with output, full_disk_told(out_dir, "Make room there."):
            once = _train(config, steps, out_dir, probes.append, with_eval)
    except BaseException:
        for probe in probes:
            if probe.closed > probe.warmup:
                with as_warning("no report"):
                    show(report_of(probe.record(), config))
        raise
    show(report_of(probes[0].record().model_copy(update={"occasions": once}), config))


def _train(
    config: RunConfig, steps: int, out_dir: Path, attached: Callable[[Any], None], with_eval: bool
) -> dict[str, float]:
    startup, live = Startup(), LiveFile(out_dir)
    startup.tell = live.starting
    watched: list[Callable[[], str | None]] = [startup.now]
    set_environment()
    gpus = leave_gpus(config)
    with Heartbeat(lambda: watched[-1]()):
        with startup.imports():
            expand_segments(os.environ)
            mend_torchvision()
            from grpo_autotune.probe.probe import Probe
            from grpo_autotune.train.runs.callbacks import StopAfter, outlast
            from grpo_autotune.train.trial_trainer import quiet_trainer
            from grpo_autotune.trials.child.occasions import checkpoint_s, evaluation_s
        with own_server(config, served_weights, gpus, out_dir, startup.phase) as overrides:
            trainer = quiet_trainer(config, startup, say, overrides=overrides, out_dir=out_dir)
            probe = Probe(trainer, startup=startup, out_dir=out_dir, profile=True, live=live)
            attached(probe)
            watched.append(probe.now)
            live.total = total = probe.warmup + -(-steps // probe.cycle) * probe.cycle
            outlast(trainer, total)
            with ProgressBar("probing", total) as bar:

                def tell(done: int) -> None:
                    bar.tick(done, f"step {done} of {total} ({'warm-up' if done <= probe.warmup else 'measured'})")

                trainer.add_callback(StopAfter(total, tell))
                try:
                    trainer.train()
                finally:
                    watched.pop()
                    probe.detach()
            if not with_eval:
                return {}
            once = {"evaluate": evaluation_s(trainer, batches=None), "save": checkpoint_s(trainer)}
            return {name: spent_s for name, spent_s in once.items() if spent_s is not None}
