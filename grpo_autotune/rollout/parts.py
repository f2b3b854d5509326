"""An unlocked engine and its parts: the hooks of a part are called where TRL builds its engine."""

from collections.abc import Iterable
from typing import Any, TypeVar

from grpo_autotune.rollout.options import EngineOptions
from grpo_autotune.seams.layers import Handle, take_off

MARK = "grpo_autotune_engine"
"""Attribute of a `VLLMGeneration`, and of its `LLM`, that holds the `Engine`."""


class Part:
    """One property of an engine that is put right; made anew for every engine, it keeps what others want to know of it.

    A subclass defines the hooks that it needs. `generation` is TRL's `VLLMGeneration`; hooks that put layers on answer
    the layers' handles."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options

    def llm_keys(self, generation: Any) -> dict[str, Any]:
        """Arguments of `LLM` that the part needs; the user's win over them."""
        return {}

    def started(self, generation: Any, llm: Any) -> list[Handle]:
        """Put layers on the `LLM`, before TRL calls any of its methods."""
        return []

    def connected(self, generation: Any, client: Any) -> list[Handle]:
        """Put layers on a server's client, before TRL asks it anything."""
        return []

    def install(self, generation: Any) -> list[Handle]:
        """Put layers on the finished `VLLMGeneration`."""
        return []


PartT = TypeVar("PartT", bound=Part)


class Engine:
    """One unlocked `VLLMGeneration`; `engine_of` finds it."""

    def __init__(self, options: EngineOptions, kinds: Iterable[type[Part]]) -> None:
        self.options = options
        self.parts = tuple(kind(options) for kind in kinds)  # in the order of installation; none once taken off
        self.llm_keys: dict[str, Any] = {}  # arguments that `LLM` was given in the end; empty for a server
        self.start_s: float | None = None  # seconds that `LLM(...)` took; None for a server
        self.handles: list[Handle] = []  # of every layer

    def take_off(self) -> None:
        """Remove every layer, and let go of the parts, which hold the trainer."""
        take_off(self.handles)
        self.parts = ()


def engine_of(owner: Any) -> Engine | None:
    """The engine behind a trainer's `vllm_generation`, or behind an `LLM`; None where it is TRL's plain one."""
    engine: Engine | None = getattr(owner, MARK, None)
    return engine


def part_of(generation: Any, kind: type[PartT]) -> PartT | None:
    """The part of this kind of a trainer's engine; None without it, or with TRL's plain engine."""
    engine = engine_of(generation)
    return None if engine is None else next((part for part in engine.parts if isinstance(part, kind)), None)
