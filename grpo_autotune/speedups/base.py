"""The interface of a speed-up: whether it can run on a trainer, putting layers on seams, and taking them off again."""

import logging
import re
from collections.abc import Iterable
from typing import Any, Protocol

from grpo_autotune.seams.layers import take_off

SERVED = ("sdpa", "flash_attention_2", "flash_attention_3")
"""Values of `attn_implementation` that the shared prefix takes. Flash kernels align a causal mask to the last query."""

FEATURE_BYTES = 1 << 30
"""Memory of `vision_cache` for features, on the tower's device."""

_FLASH = re.compile(r"flash[-_]att(?:entio)?n[-_]?(\d?)")


def kernel_name(implementation: str | None) -> str:
    """The attention kernel of an `attn_implementation` under transformers' own name for it; None is `sdpa`, and builds
    from the hub (`kernels-community/flash-attn2`, `.../vllm-flash-attn3`) are FlashAttention like the others."""
    if implementation is None:
        return "sdpa"
    flash = _FLASH.search(implementation)
    return implementation if flash is None else f"flash_attention_{flash[1] or 2}"


_logger = logging.getLogger("grpo_autotune.speedups")


class Removable(Protocol):
    """A part of an installed speed-up, such as a `seams.layers.Handle`."""

    def remove(self) -> None:
        """Take it out; may be called twice."""


class Installed:
    """A speed-up that is on."""

    def __init__(self, name: str, handles: Iterable[Removable] = ()) -> None:
        self.name = name
        self.handles: list[Removable] = list(handles)
        self.fell_back: str | None = None  # why it left the work to TRL after all; None while it does its work
        self.counts: dict[str, float] = {}

    def fall_back(self, reason: str) -> None:
        """Leave the work to TRL from now on, and warn once."""
        if self.fell_back is None:
            self.fell_back = reason
            _logger.warning("speed-up %s is off from here on, training goes on without it: %s", self.name, reason)

    def remove(self) -> None:
        """Take every layer out; may be called twice."""
        take_off(self.handles)

    @property
    def exact(self) -> bool:
        """False where it equals TRL in the mean over what is drawn alone; it is compared with nothing dropped."""
        return True

    @property
    def note(self) -> str:
        """Remark beside its summary in the table; empty where there is nothing to say."""
        return ""

    def facts(self) -> dict[str, float]:
        """Counts of its work so far, by name."""
        return dict(self.counts)


class SpeedUp(Protocol):
    """One speed-up; its class is a row of the registry, and is built with the options that a configuration gives."""

    name: str
    summary: str  # what it does, in one line
    stands_for: tuple[str, ...]  # methods whose place it takes (`conditions.overridden`): off where one is not TRL's

    def applies(self, trainer: Any) -> str | None:
        """None where it can run on this trainer, else why not: one sentence that names the key."""

    def install(self, trainer: Any) -> Installed:
        """Put its layers on the trainer's seams, `INNER`, so that a probe stays outside them."""
