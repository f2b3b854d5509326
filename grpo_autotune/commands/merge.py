"""`grpo-autotune merge`: an adapter merged into its base, or whole weights copied, in a folder that proves itself."""

from itertools import count
from pathlib import Path

from grpo_autotune.commands.imports import mend_torchvision, set_environment
from grpo_autotune.console import ProgressBar, say
from grpo_autotune.records.trained import Merged
from grpo_autotune.trained.source import find_trained

LINE_S = 5.0
"""Seconds between two lines of progress without a terminal."""


def merge_trained(place: str, out: Path, *, adapter: str | None, dtype: str | None, rows: int) -> Merged:
    """Merge the trained weights at `place` into the folder `out`, with progress; errors as `trained.merge.merge`."""
    trained = find_trained(place, adapter=adapter)
    set_environment()
    mend_torchvision()
    from grpo_autotune.train.runs.quiet import quieten
    from grpo_autotune.trained.merge import merge, steps_of

    quieten(bars=False)
    say(f"merging {trained.path} into {out}")
    with ProgressBar("merge", steps_of(rows)) as bar:
        steps = count()

        def step(what: str) -> None:
            done = next(steps)
            told = f"{what}, {bar.time_left(done)}" if done else what
            bar.update(done, told, f"merge: {told}", LINE_S)

        return merge(trained, out.expanduser().absolute(), dtype=dtype, rows=rows, step=step)
