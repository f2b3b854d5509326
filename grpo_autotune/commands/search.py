"""`grpo-autotune search`: from a budget to tuned configurations."""

import signal
from pathlib import Path
from typing import Any

from grpo_autotune.commands.imports import set_environment
from grpo_autotune.commands.page import keep_page
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import progress_console
from grpo_autotune.probe.live import LiveFile
from grpo_autotune.processes.ending import Stopped, raising
from grpo_autotune.records.search import SearchReport
from grpo_autotune.render.search_live import SearchView
from grpo_autotune.search.session import search
from grpo_autotune.trials.parent.runner import Runner


def search_config(config: RunConfig, *, run_dir: Path, **asked: Any) -> tuple[SearchReport, int]:
    """Search with real trials, the progress on standard error; also the exit code: 0, or 128 + a signal that ended it.
    What else is asked for is handed on to `search.session.search`."""
    set_environment()
    live = LiveFile(run_dir)
    came: list[int] = [signal.SIGINT]

    def end(signum: int) -> BaseException:
        came.append(signum)
        return Stopped(signum)

    with raising(end), SearchView(progress_console()) as view:
        view.tell = lambda state: None if state.progress else live.write(search=state)  # as a trial begins
        report = search(config, run_dir=run_dir, view=view, runner=Runner, **asked)
    keep_page(run_dir)
    return report, 128 + came[-1] if report.ended == "interrupted" else 0
