"""Collectives of a step apart from its work: spans of `sync_wait`, whichever library shares the model or its gradients.

A collective that Python starts is a method of `ProcessGroup`, and whoever needs its result waits in `Work.wait`: ZeRO,
FSDP2 and torch's functions come down to these two. DDP's reducer is C++ and waits in a callback of autograd, after the
last gradient. On CUDA it is the stream that waits, which marks on the computing stream time; a collective on another
stream takes nothing until the computing stream waits for that stream, or for an event that was recorded on it.
"""

import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.distributed_c10d import ProcessGroup, Work

from grpo_autotune.probe.spans import SpanRecorder
from grpo_autotune.probe.stages import APART
from grpo_autotune.seams.layers import AttributeSlot, Handle, Layer, Next, wrap

WAITING = "sync_wait"
GATHERED, REDUCED, EXCHANGED, UNKNOWN = "gather_parameters", "reduce_gradients", "exchange", ""
KINDS = {
    "_?all_?gather": GATHERED,
    "_?(all_?)?reduce": REDUCED,
    "broadcast|barrier|gather|scatter|all_?to_?all": EXCHANGED,
}
"""Beginning of a method of `ProcessGroup` (versions of torch differ in the rest) -> part of `sync_wait`."""

WHERE = {
    REDUCED: ("backward", "optimizer"),
    GATHERED: ("generation", "policy_logprob", "reference_logprob", "backward", "optimizer", "weight_sync"),
}
"""Part -> stages in which it is of gradients, or of a model's parameters; elsewhere ranks exchange something else."""


class Collectives:
    """Layers on what the ranks of one trainer do together."""

    def __init__(self, recorder: SpanRecorder, trainer: Any) -> None:
        self._recorder, self._trainer = recorder, trainer
        # kinds of works under way and of events behind them, and of what was last begun on streams beside the computing
        self._kinds: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._streams: dict[Any, str] = {}
        self._computing = None if recorder.timer is None else torch.cuda.current_stream()

    def install(self) -> list[Handle]:
        """Put the layers on, which hold nothing of this; none where there is one rank."""
        if self._trainer.accelerator.num_processes == 1:
            return []
        methods = (
            (name, next((k for word, k in KINDS.items() if re.match(word, name)), None)) for name in vars(ProcessGroup)
        )
        rows: list[tuple[Any, str, Callable[..., Any]]] = [
            *((ProcessGroup, name, partial(Collectives._begin, kind=kind)) for name, kind in methods if kind),
            (Work, "wait", Collectives._wait),
            (functional, "wait_tensor", Collectives._wait),
            (dist, "_broadcast_coalesced", partial(Collectives._begin, kind=EXCHANGED)),  # of DDP's buffers
        ]
        if self._computing is not None:
            waits = ("wait_stream", "wait_event", "synchronize")
            rows += [(torch.cuda.Stream, name, Collectives._wait_on_stream) for name in waits]
            rows.append((torch.cuda.Stream, "record_event", Collectives._record))
        return [wrap(AttributeSlot(owner, name), self._while_alive(method)) for owner, name, method in rows]

    def begin_backward(self, loss: Any) -> None:
        """Have a span opened once DDP has all gradients, for the wait of its reducer; it ends with the backward pass.
        Callbacks run in the order in which they were queued, and the reducer queues its own with the last gradient."""
        if getattr(self._trainer.model_wrapped, "require_backward_grad_sync", False) and loss.requires_grad:
            queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
            loss.register_hook(lambda gradient: queue(self._reduced))

    def _reduced(self) -> None:
        if self._recorder.inside("backward"):
            self._recorder.begin(WAITING, REDUCED)

    def _while_alive(self, method: Callable[..., Any]) -> Layer:
        alive = weakref.ref(self)

        def layer(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
            one = alive()
            return (
                call_next(*args, **kwargs) if one is None else method(one, partial(call_next, *args, **kwargs), *args)
            )

        return layer

    def _begin(self, call: Next, /, *args: Any, kind: str) -> Any:
        work = self._timed(kind, call)
        if isinstance(work, Work):
            self._kinds[work] = kind
        return work

    def _wait(self, call: Next, /, awaited: Any, *args: Any) -> Any:
        return self._timed(self._kinds.get(awaited, UNKNOWN) if isinstance(awaited, Work) else UNKNOWN, call)

    def _wait_on_stream(self, call: Next, /, stream: Any, awaited: Any = None) -> Any:
        """The wait of a stream for another one or an event, or the host's for this one (`synchronize`)."""
        known = self._streams if awaited is None or isinstance(awaited, torch.cuda.Stream) else self._kinds
        kind = known.get(stream if awaited is None else awaited)
        computes = awaited is None or stream == self._computing
        return call() if kind is None or not computes else self._timed(kind, call)

    def _record(self, call: Next, /, stream: Any, *args: Any) -> Any:
        event = call()
        if stream in self._streams:
            self._kinds[event] = self._streams[stream]
        return event

    def _timed(self, kind: str, call: Next) -> Any:
        """Call in a span, in the thread of the step or, while that waits for it, of the backward pass; without one
        inside another wait, vLLM, a save or an evaluation."""
        recorder = self._recorder
        within = recorder.current()
        if within is None or within.stage == WAITING or recorder.inside(APART):
            return call()
        if not (recorder.on_main_thread() or recorder.inside("backward")):
            return call()
        if within.stage == "generation" and self._trainer.use_vllm:
            return call()
        if self._computing is not None and (stream := torch.cuda.current_stream()) != self._computing:
            self._streams[stream] = kind
            return call()
        kinds = WHERE if kind == UNKNOWN else [kind]
        part = next((kind for kind in kinds if within.stage in WHERE.get(kind, ())), EXCHANGED)
        span = recorder.begin(WAITING, part)
        try:
            return call()
        finally:
            recorder.end(span)
