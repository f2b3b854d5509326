"""NVTX ranges around the stages, for Nsight Systems: asked for by `GRPO_AUTOTUNE_NVTX=1`, on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from grpo_autotune.probe.spans import Span, SpanRecorder

VARIABLE = "GRPO_AUTOTUNE_NVTX"


def recorder_for(device: Any, **arguments: Any) -> SpanRecorder:
    """The recorder for a trainer on `device`, one with ranges where they are asked for; `arguments` are a
    `SpanRecorder`'s. The plain one knows nothing of ranges, so that they cost nothing."""
    if os.environ.get(VARIABLE) != "1" or device.type != "cuda":
        return SpanRecorder(**arguments)
    from torch.cuda import nvtx

    return RangeRecorder(nvtx.range_push, nvtx.range_pop, **arguments)


class RangeRecorder(SpanRecorder):
    """Opens a range with each span of the main thread: `push` takes its stage and part, `pop` ends the innermost."""

    def __init__(self, push: Callable[[str], Any], pop: Callable[[], Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._push, self._pop = push, pop

    def begin(self, stage: str, part: str = "") -> Span:
        """Open a span and its range."""
        self._push(": ".join(word for word in (stage, part) if word))
        return super().begin(stage, part)

    def end(self, span: Span) -> None:
        """Close a span with all that is open inside it, and their ranges."""
        open_before = len(self._stack)
        super().end(span)
        self._pop_ranges(open_before)

    def abandon(self) -> None:
        """Drop the step under way with its ranges."""
        open_before = len(self._stack)
        super().abandon()
        self._pop_ranges(open_before)

    def _pop_ranges(self, open_before: int) -> None:
        for _ in range(open_before - len(self._stack)):
            self._pop()
