"""A trial's folder as the parent prepares it and reads the outcome from it."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from grpo_autotune.files import write_whole
from grpo_autotune.records.trial import (
    HEARTBEAT_FILE,
    LOG_FILE,
    OUTCOME_FILE,
    SPEC_FILE,
    Status,
    TrialOutcome,
    TrialSpec,
)
from grpo_autotune.trials.block_limit import LIMIT_FILE
from grpo_autotune.trials.endings import Ending

GRAVEST: tuple[Status, ...] = ("oom", "reward_failed", "invalid", "crashed", "ok")
"""Of the ranks' outcomes the first of these counts: when one fails, the others fail because of it."""

LEFTOVERS = (OUTCOME_FILE, "outcome.rank*.json", HEARTBEAT_FILE, LOG_FILE, LIMIT_FILE, "spans*.jsonl")
"""Files of an earlier run of the trial, which are not to be read as new."""


def prepare_folder(run_dir: Path, spec: TrialSpec) -> Path:
    """Make the trial's folder, empty it, and write the spec into it; OSError where it cannot be written."""
    folder = run_dir / "trials" / f"{spec.number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in LEFTOVERS:
        for path in folder.glob(name):
            path.unlink()
    write_whole(folder / SPEC_FILE, spec.model_dump_json(indent=1))
    return folder


def read_outcome(folder: Path, spec: TrialSpec, ending: Ending | None) -> TrialOutcome:
    """The outcomes that the child's ranks wrote, made one. The ending as it was seen from outside counts where the
    child wrote nothing, or no failure."""
    if ending is not None and ending.status in ("timeout", "hang"):
        return TrialOutcome(number=spec.number, **ending._asdict())
    outcomes = []
    for path in sorted(folder.glob("outcome*.json")):
        try:
            outcomes.append(TrialOutcome.model_validate_json(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            ending = Ending("crashed", f"{path.name} cannot be read: {error.errors()[0]['msg']}")
    if ending is not None and all(outcome.status == "ok" for outcome in outcomes):
        return TrialOutcome(number=spec.number, **ending._asdict())
    return _as_one(outcomes) if outcomes else TrialOutcome(number=spec.number, status="crashed")


def _as_one(outcomes: Sequence[TrialOutcome]) -> TrialOutcome:
    """The gravest rank's status on the first rank's figures, with the most memory that any rank took."""
    gravest = min(outcomes, key=lambda outcome: GRAVEST.index(outcome.status))
    worst = max(outcomes, key=lambda outcome: (outcome.peak_bytes or 0) - (outcome.idle_bytes or 0))
    base = outcomes[0] if gravest.status == "ok" else gravest
    return base.model_copy(
        update={name: getattr(worst, name) for name in ("peak_bytes", "idle_bytes", "device_memory")}
    )
