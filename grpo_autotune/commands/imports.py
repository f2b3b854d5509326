"""What has to happen before transformers and TRL are imported."""

from __future__ import annotations

from grpo_autotune.commands.console import say
from grpo_autotune.seams.compat import ensure_torchvision


def mend_torchvision() -> None:
    """Let torchvision import beside a torch it was not built for, and say so."""
    finding = ensure_torchvision()
    if finding is not None:
        say(f"note: {finding}")
