"""The receipt of a merge as a few lines for a terminal."""

from grpo_autotune.records.merged import Difference, Merged
from grpo_autotune.units import plural


def render_merged(merged: Merged, out: str) -> str:
    """A line each for what was merged, the two differences that prove it, and what to know about it."""
    proof = merged.proof
    lines = [
        f"{merged.trained} merged into {merged.base}" if merged.base else f"{merged.trained} copied",
        f"  merged and trained model   {_nats(proof.merged)}   at most {proof.limit:g}",
        f"  base and trained model     {_nats(proof.base)}   on average at least {proof.factor:g} times as far"
        if proof.base
        else "  base                       not known: a full fine-tune outside of its run",
        f"  |difference of log-probs| over {plural(proof.tokens, 'token')} of {proof.prompts} and greedy answers, "
        f"computed in {proof.dtype}",
        *(f"  {note}" for note in merged.notes),
        f"Saved: {out} ({merged.dtype}, embeddings {'' if merged.tied else 'not '}tied); receipt: {out}/merged.json",
    ]
    return "\n".join(lines)


def _nats(difference: Difference) -> str:
    return f"mean {difference.mean:<8.2g} max {difference.max:<8.2g} nats"
