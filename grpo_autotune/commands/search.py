"""`grpo-autotune search`: from a budget to tuned configurations."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from grpo_autotune.commands.imports import set_environment
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.console import INTERRUPTED_EXIT
from grpo_autotune.records.search import SearchReport
from grpo_autotune.render.search_live import SearchView
from grpo_autotune.search.session import search
from grpo_autotune.trials.parent.runner import Runner


def search_config(
    config: RunConfig,
    *,
    budget_s: float,
    out: Path | None,
    run_dir: Path,
    resume: bool,
    storage: str | None,
    script: list[str] | None = None,
) -> tuple[SearchReport, int]:
    """Search with real trials, the progress on standard error.

    Returns:
        The report, and the exit code: 0, or 130 where Ctrl-C ended it.

    Raises:
        AutotuneError: As for `search.session.search`.
    """
    set_environment()
    with SearchView(Console(stderr=True)) as view, _terminated_as_interrupted():
        report = search(
            config,
            budget_s=budget_s,
            out=out,
            run_dir=run_dir,
            resume=resume,
            storage=storage,
            view=view,
            runner=Runner,
            script=script,
        )
    return report, INTERRUPTED_EXIT if report.ended == "interrupted" else 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a search as Ctrl-C does: with the best so far, and no process left."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
