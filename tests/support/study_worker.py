"""A machine of a shared study, with trials on paper: `python -m tests.support.study_worker URL FOLDER BUDGET [hang]`.

With `hang` it stops in its third trial for ever, its heartbeat with it, to be killed there. With `workers` it has two.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from grpo_autotune.hardware.places import Place
from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.search import storage
from grpo_autotune.search.session import search
from tests.support.paper_machine import MACHINE, Listener, PaperModels, PaperTrials, user_config

REAL_S = 1.0
"""Seconds that a trial really takes, so that two machines meet."""


def main(url: str, folder: str, budget_s: str, hang: str = "") -> int:
    storage.HEARTBEAT_S, storage.GRACE_S = 1, 3
    timed = 0

    def act(spec: TrialSpec) -> TrialOutcome | None:
        nonlocal timed
        timed += spec.purpose == "timed"
        if hang == "hang" and timed == 3:
            (Path(folder) / "hanging").write_text(str(spec.number))
            time.sleep(600)
        time.sleep(REAL_S)
        return None

    trials = PaperTrials(Path(folder), act=act)
    places = tuple(Place(f"core {n}", cores=(n,)) for n in range(2)) if hang == "workers" else ()
    search(
        user_config(),
        budget_s=float(budget_s),
        out=None,
        run_dir=Path(folder),
        storage=url,
        view=Listener(),
        runner=lambda _: trials,
        fit=lambda *probe: PaperModels(),
        clock=trials.clock,
        machine=MACHINE,
        places=places,
        worker=lambda _, place: trials.worker(1.5),
        wait=trials.wait,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
