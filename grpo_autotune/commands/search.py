"""`grpo-autotune search`: from a budget to tuned configurations."""

import signal
from functools import cache, partial
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import set_environment
from grpo_autotune.commands.page import keep_page
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import progress_console
from grpo_autotune.hardware import detect
from grpo_autotune.hardware.places import Place, divide
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.processes.ending import Stopped, raising
from grpo_autotune.records.search import SearchReport
from grpo_autotune.render.search_live import SearchView
from grpo_autotune.search.session import search
from grpo_autotune.trials.parent.recovery import used_gpu_bytes
from grpo_autotune.trials.parent.runner import Runner
from grpo_autotune.trials.parent.worker import Worker


def search_config(config: RunConfig, workers: str, *, run_dir: Path, **asked: Any) -> tuple[SearchReport, int]:
    """Search with real trials, `workers` (or `auto`) at a time, the progress on standard error; also the exit code: 0,
    or 128 + a signal that ended it. What else is asked for is handed on to `search.session.search`. ConfigError where
    there is no room for so many workers."""
    set_environment()
    machine, processes = detect(), config.batch.processes
    gpus = () if config.grpo.get("use_cpu") else machine.gpus
    places = divide(machine.model_copy(update={"gpus": gpus}), workers, processes)
    if places:  # a trial sees so many GPUs, and has to fit onto the smallest
        smallest = sorted(gpus, key=lambda gpu: gpu.memory_bytes)[:processes]
        machine = machine.model_copy(update={"gpus": tuple(smallest)})

    one_process = processes == 1 and asked.get("script") is None  # which its trials keep to their cores

    @cache
    def worker(folder: Path, place: Place) -> Runner:
        used = partial(used_gpu_bytes, place.gpus) if place.gpus else used_gpu_bytes
        return Runner(folder, spawn=partial(Worker, place=place if place.gpus or not one_process else None), used=used)

    def alone(folder: Path) -> Runner:
        return worker(folder, places[0]) if places and (places[0].gpus or one_process) else Runner(folder)

    live = LiveFile(run_dir)
    came: list[int] = [signal.SIGINT]

    def end(signum: int) -> BaseException:
        came.append(signum)
        return Stopped(signum)

    with raising(end), SearchView(progress_console()) as view:
        view.tell = lambda state: None if state.progress else live.write(search=state)  # as a trial begins
        report = search(
            config, run_dir=run_dir, view=view, machine=machine, runner=alone, places=places, worker=worker, **asked
        )
    keep_page(run_dir)
    return report, 128 + came[-1] if report.ended == "interrupted" else 0
