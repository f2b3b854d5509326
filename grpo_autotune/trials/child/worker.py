"""The child process: it runs one trial after another as the parent names them, and writes an outcome file for each.

    python -m grpo_autotune.trials.child.worker            trial folders on standard input, a line each
    python -m grpo_autotune.trials.child.worker FOLDER     that one trial, as a rank under `torchrun`

It loads torch only with its first trial in hand, so that the wait is that trial's start-up, seen and counted; or
before, where a line names a file instead, which it then deletes.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from grpo_autotune.console import accept_any_text
from grpo_autotune.files import write_whole
from grpo_autotune.probe.startup import Startup
from grpo_autotune.processes.guardian import die_with_parent
from grpo_autotune.records.trial import LOG_FILE, OUTCOME_FILE, SPEC_FILE, TrialSpec
from grpo_autotune.trials.child.execute import TrialExecutor, load_libraries
from grpo_autotune.trials.exit_codes import CANNOT_WRITE, RETIRED
from grpo_autotune.trials.heartbeat import STARTING, HeartbeatWriter


def main(arguments: Sequence[str]) -> int:
    """Run trials until standard input ends, or run the one that is named."""
    die_with_parent(os.getppid())
    accept_any_text()
    executor = TrialExecutor()
    if arguments:
        return _run_one(executor, Path(arguments[0]), warm=False)
    warm = False
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        if path.is_file():
            with Startup().imports():
                load_libraries()
            path.unlink(missing_ok=True)
        elif code := _run_one(executor, path, warm=warm):
            return code
        warm = True
    return 0


def _run_one(executor: TrialExecutor, folder: Path, *, warm: bool) -> int:
    """Run the trial in `folder`; 0 if this process can run another."""
    rank = int(os.environ.get("RANK", "0"))
    _log_to(folder / LOG_FILE)
    spec = TrialSpec.model_validate_json((folder / SPEC_FILE).read_text(encoding="utf-8"))
    heartbeat = HeartbeatWriter(folder, silent=rank > 0)
    heartbeat.beat(STARTING)
    startup = Startup(born_s=time.time() if warm else None)
    startup.tell = heartbeat.starting
    outcome = executor.execute(spec, folder, startup, heartbeat)
    heartbeat.close()
    path = folder / (OUTCOME_FILE if rank == 0 else f"outcome.rank{rank}.json")
    try:
        write_whole(path, outcome.model_copy(update={"warm": warm}).model_dump_json(indent=1))
    except OSError:  # the log cannot be written either
        return CANNOT_WRITE
    return 0 if executor.reusable else RETIRED


def _log_to(path: Path) -> None:
    """Lead standard output and error, other libraries' and grandchildren's included, to the trial's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == CANNOT_WRITE:
        os._exit(code)  # Python's last flush of the log would fail as well, and end with a code of its own
    sys.exit(code)
