"""Choice of the form of attention for each pass: where there is one, it is measured on the batch at hand.

The forms of `attention` and `flex` compute the same, and everything else of a pass is the
same for both. So attention alone is timed, forward and, where gradients are wanted, backward: on random states with the
heads and types that the self-check saw in the model, in the layout of the batch under way, once per class of shapes.
Neither the model nor the random stream notices.

H: heads, T: tokens of the flat sequence, D: width of a head.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from grpo_autotune.hardware.out_of_memory import is_of_the_machine
from grpo_autotune.seams.first_use import first_use
from grpo_autotune.speedups.selfcheck import TOLERANCE
from grpo_autotune.speedups.shared_prefix.attention import Attention, FastForm, Split, States
from grpo_autotune.speedups.shared_prefix.cascade import Cascade
from grpo_autotune.speedups.shared_prefix.flex import Flex, compiled
from grpo_autotune.speedups.shared_prefix.layout import Layout
from grpo_autotune.speedups.shared_prefix.varlen import FlashCpu, FlashCuda

AUTO, FLEX, CASCADE = "auto", "flex", "cascade"
"""Values of the option `form`, beside `split`."""

ROUNDS = 5
WARMUP = 2
"""Rounds that are not counted: they compile."""

MARGIN = 1.03
"""How many times faster than `Split` a form has to be, in the median of the rounds, to be taken."""

_logger = logging.getLogger("grpo_autotune.speedups")

Clock = Callable[[], float]
ShapeClass = tuple[bool, int, int, int]
"""With gradients; and the binary digits of the tokens, of the longest prompt and of the widest group of completions."""


def candidates(device: torch.device, form: str) -> list[FastForm]:
    """The forms that may take the place of `Split` on a device, by the value of the option `form`: on a CPU `Cascade`
    is taken as it is where that is `auto`; on CUDA both have to be asked for and are timed."""
    if device.type == "cuda":
        return [Flex(compiled())] if form == FLEX else [Cascade(FlashCuda(), timed=True)] if form == CASCADE else []
    return [Cascade(FlashCpu(), timed=False)] if device.type == "cpu" and form in (AUTO, CASCADE) else []


class ObservedAttention(NamedTuple):
    """Attention of one layer, as the self-check met it; `shapes` (1, H, T, D) and `dtypes` of query, key and value."""

    attention: Attention
    module: Any
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    kwargs: dict[str, Any]


class Timed(NamedTuple):
    """A class of shapes, and how many times faster than `Split` the form was there."""

    shape: ShapeClass
    tokens: int
    faster: float


class Choice:
    """The form for each pass of one trainer: the given one, where it is faster; None where there is no choice."""

    def __init__(self, form: FastForm | None, clock: Clock = time.perf_counter) -> None:
        self._form, self._clock = form, clock
        self._seen: dict[Any, ObservedAttention] = {}  # by sliding window, which is all that tells layers apart
        self.timed: dict[ShapeClass, Timed] = {}
        self.passes = 0  # that took the form

    def watching(self, layout: Layout) -> Layout:
        """The layout of a self-check: a form that is timed later looks at attention and leaves it to `Split`."""
        if self._form is None:
            return layout
        return replace(layout, form=self._watch if self._form.timed else self._form)

    def _watch(self, attention: Attention, module: Any, states: States, layout: Layout, kwargs: dict[str, Any]) -> None:
        shapes, dtypes = [state.shape for state in states], [state.dtype for state in states]
        self._seen.setdefault(
            kwargs.get("sliding_window"), ObservedAttention(attention, module, shapes, dtypes, dict(kwargs))
        )

    def made(self, layout: Layout) -> Layout:
        """The layout with the form that is faster on it; under the autocast of the pass."""
        if self._form is None or self._form.failed is not None or not self._is_faster(self._form, layout):
            return layout
        self.passes += 1
        return replace(layout, form=self._form)

    def _is_faster(self, form: FastForm, layout: Layout) -> bool:
        if not form.timed:
            return True
        if not self._seen:
            return False
        shape = _class_of(layout)
        if shape not in self.timed:
            with first_use():
                self.timed[shape] = Timed(shape, layout.tokens, self._faster(form, layout))
            _logger.info("shared_prefix: %s", self.note())
        return form.failed is None and self.timed[shape].faster >= MARGIN

    def facts(self) -> dict[str, float]:
        """Passes that took the form, and where it is timed how many times faster it was at best; empty without one."""
        if self._form is None:
            return {}
        best = max((row.faster for row in self.timed.values()), default=0.0)
        timed = {f"{self._form.key}_times_faster": best} if self._form.timed else {}
        return {f"{self._form.key}_passes": self.passes, **timed}

    def note(self) -> str:
        if self._form is None:
            return ""
        if self._form.failed is not None:
            return f"{self._form.name} is not used: {self._form.failed}"
        if not self._form.timed:
            return ""
        if not self.timed:
            return f"{self._form.name} is timed on the first batch of each size"
        measured = [
            f"{row.faster:.2f}x in a {'training' if row.shape[0] else 'no-gradient'} pass of {row.tokens} tokens"
            for row in self.timed.values()
        ]
        return f"{self._form.name} where it is faster ({', '.join(measured)})"

    def _faster(self, form: FastForm, layout: Layout) -> float:
        """Seconds of `Split` over those of the form; 0 where the form fails or computes something else."""
        try:
            quotients = [self._round(form, layout, number) for number in range(WARMUP + ROUNDS)]
        except form.failures() as error:
            if is_of_the_machine(error):
                raise
            form.give_up(f"{type(error).__name__} while it was timed")
        return 0.0 if form.failed is not None else statistics.median(quotients[WARMUP:])

    def _round(self, form: FastForm, layout: Layout, number: int) -> float:
        """Both forms over one layer of each kind; the first round compares what they compute."""
        taken = {True: 0.0, False: 0.0}
        for seen in self._seen.values():
            states, layout = _states(seen, layout), replace(layout, served={})
            results: dict[bool, list[torch.Tensor]] = {}
            for by_form in (True, False) if number % 2 else (False, True):
                _wait(layout)
                begin = self._clock()
                results[by_form] = self._once(form if by_form else None, seen, states, layout)
                _wait(layout)
                taken[by_form] += self._clock() - begin
            if not number and form.failed is None:
                _compare(form, results[True], results[False])
        return taken[False] / taken[True]

    def _once(
        self, form: FastForm | None, seen: ObservedAttention, states: States, layout: Layout
    ) -> list[torch.Tensor]:
        given = (seen.attention, seen.module, states, layout, seen.kwargs)
        output = None if form is None else form(*given)
        if output is None:
            output = Split(seen.module.config._attn_implementation)(*given)
        if not torch.is_grad_enabled():
            return [output]
        return [output, *torch.autograd.grad(output, states, torch.ones_like(output))]


def _states(seen: ObservedAttention, layout: Layout) -> States:
    """Query, key and value such as the model's, for the tokens of this layout."""
    device = layout.source.device
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(1, layout.tokens, shape[1], shape[3]) for shape in seen.shapes]  # as projections leave them
    grad = torch.is_grad_enabled()
    return tuple(
        torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2).requires_grad_(grad)
        for size, dtype in zip(sizes, seen.dtypes, strict=True)
    )


def _compare(form: FastForm, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Have the form give up where its output or gradients differ by more than rounding."""
    limit = TOLERANCE.get(wanted[0].dtype, TOLERANCE[torch.bfloat16])
    for ours, theirs in zip(found, wanted, strict=True):
        difference = float((ours - theirs).detach().double().norm() / theirs.detach().double().norm())
        if not difference <= limit:  # also where it is not a number
            form.give_up(f"it is off by {difference:.1e} (limit {limit:.0e})")
            return


def _class_of(layout: Layout) -> ShapeClass:
    prompt = max(span.prompt for span in layout.spans)
    width = max(span.width for span in layout.spans)
    return torch.is_grad_enabled(), layout.tokens.bit_length(), prompt.bit_length(), width.bit_length()


def _wait(layout: Layout) -> None:
    """A device works on while the clock of its host goes on."""
    if layout.source.device.type == "cuda":
        torch.cuda.synchronize(layout.source.device)
