"""A probe's split of what another framework's timers hold together."""

from collections.abc import Iterator

from grpo_autotune.records.imported import titled
from grpo_autotune.records.report import Report
from grpo_autotune.units import percent, seconds

LUMPS = {"verl": "update_actor", "easyr1": "update_actor"}
"""Framework -> its timer around the whole training pass; the others have none, and so no split of one."""


def split_lines(report: Report, framework: str) -> Iterator[str]:
    """The training pass by forward, backward and optimizer, as measured here."""
    stages = {stage.name: stage for stage in report.stages}
    parts = {part.name: part.self_s for part in stages["policy_logprob"].parts} if "policy_logprob" in stages else {}
    pieces = {
        "forward": parts.get("training_forward", 0.0),
        **{name: stages[name].self_s for name in ("backward", "optimizer") if name in stages},
    }
    whole = sum(pieces.values())
    if whole > 0:
        name = f"{titled(framework)}'s {LUMPS[framework]}" if framework in LUMPS else "The training pass"
        shares = ", ".join(f"{percent(piece / whole)} {part}" for part, piece in pieces.items())
        yield f"{name} holds {shares}: {seconds(whole)} of a step of {seconds(report.step_s)}."
        yield f"That is TRL on this machine, with the imported batch; {titled(framework)} itself was not measured."
