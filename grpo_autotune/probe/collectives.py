"""Collectives of a step apart from its work: spans of `sync_wait`, whichever library shares the model or its gradients.

A collective that Python starts is a method of `ProcessGroup`, and whoever needs its result waits in `Work.wait`: ZeRO,
FSDP2 and torch's functions come down to these two. DDP's reducer is C++ and waits in a callback of autograd, after the
last gradient. On CUDA the stream waits, which marks on the computing stream time; a collective on another stream takes
nothing until the computing stream waits for that stream, or for an event that was recorded on it.
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

GATHERED, REDUCED, EXCHANGED, UNKNOWN = "gather_parameters", "reduce_gradients", "exchange", ""
KINDS = {"_?all_?gather": GATHERED, "_?(all_?)?reduce": REDUCED, "broadcast|barrier|gather|scatter|all_?to": EXCHANGED}
"""Beginning of a method of `ProcessGroup` (versions of torch differ in the rest) -> part of `sync_wait`."""

WHERE = {
    REDUCED: ("backward", "optimizer"),
    GATHERED: ("generation", "policy_logprob", "reference_logprob", "backward", "optimizer", "weight_sync"),
}
"""Part -> stages in which it is of gradients, or of a model's parameters; elsewhere ranks exchange something else."""


class Collectives:
    """Layers on what the ranks of one trainer do together; they hold nothing of it."""

    def __init__(self, recorder: SpanRecorder, trainer: Any) -> None:
        self._recorder, self._trainer = recorder, trainer
        # kinds of works under way, of events, and of what was last begun on streams beside the computing one
        self._kinds: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._streams: dict[Any, str] = {}
        self._computing: torch.cuda.Stream | None = None

    def install(self) -> list[Handle]:
        """Put the layers on; none where there is one rank."""
        if self._trainer.accelerator.num_processes == 1:
            return []
        self._computing = None if self._recorder.timer is None else torch.cuda.current_stream()
        begin, rows = Collectives._begin, list[tuple[Any, str, Callable[..., Any]]]()
        for beginning, kind in KINDS.items():
            names = [name for name in vars(ProcessGroup) if re.match(beginning, name)]
            rows += [(ProcessGroup, name, partial(begin, kind=kind)) for name in names]
        rows.append((dist, "_broadcast_coalesced", partial(begin, kind=EXCHANGED)))  # of DDP's buffers
        rows += [(Work, "wait", Collectives._wait), (functional, "wait_tensor", Collectives._wait)]
        if self._computing is not None:
            waits = ("wait_stream", "wait_event", "synchronize")
            rows += [(torch.cuda.Stream, name, Collectives._wait_on_stream) for name in waits]
            rows.append((torch.cuda.Stream, "record_event", Collectives._record))
        return [wrap(AttributeSlot(owner, name), self._while_alive(method)) for owner, name, method in rows]

    def begin_backward(self, loss: Any) -> None:
        """Have a span opened once DDP has all gradients, for the wait of its reducer; it ends with the backward pass.
        Callbacks run in the order in which they were queued, and the reducer queues its own with the last gradient."""
        if getattr(self._trainer.model_wrapped, "require_backward_grad_sync", False) and loss.requires_grad:
            queue = torch.autograd.Variable._execution_engine.queue_callback
            loss.register_hook(lambda gradient: queue(self._reduced))

    def _reduced(self) -> None:
        if self._recorder.inside("backward"):
            self._recorder.begin("sync_wait", REDUCED)

    def _while_alive(self, method: Callable[..., Any]) -> Layer:
        alive = weakref.ref(self)

        def layer(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
            call = partial(call_next, *args, **kwargs)
            return call() if (one := alive()) is None else method(one, call, *args)

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
        source = stream if awaited is None else awaited
        kind = (self._streams if isinstance(source, torch.cuda.Stream) else self._kinds).get(source)
        computes = awaited is None or stream == self._computing
        return self._timed(kind, call) if kind is not None and computes else call()

    def _record(self, call: Next, /, stream: Any, *args: Any) -> Any:
        event = call()
        if stream in self._streams:
            self._kinds[event] = self._streams[stream]
        return event

    def _timed(self, kind: str, call: Next) -> Any:
        """Call in a span, in the thread of the step or, while that waits for it, of the backward pass; without one
        inside another wait, vLLM, a save or an evaluation."""
        recorder, trainer = self._recorder, self._trainer
        stage = span.stage if (span := recorder.current()) is not None else "sync_wait"
        if stage == "sync_wait" or recorder.inside(APART) or (stage == "generation" and trainer.use_vllm):
            return call()
        if not (recorder.on_main_thread() or recorder.inside("backward")):
            return call()
        if self._computing is not None and (stream := torch.cuda.current_stream()) != self._computing:
            self._streams[stream] = kind
            return call()
        part = next((one for one in WHERE if kind in (one, UNKNOWN) and stage in WHERE[one]), EXCHANGED)
        span = recorder.begin("sync_wait", part)
        try:
            return call()
        finally:
            recorder.end(span)
