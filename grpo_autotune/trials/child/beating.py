"""Signs of life inside one span of a trial: forwards, steps of an engine, answers of a server, and compiling.

A span may hold the sampling of thousands of tokens, by the model or by an engine, and a first forward may compile for
minutes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from grpo_autotune.seams.layers import INNER, AttributeSlot, wrap
from grpo_autotune.trials.heartbeat import ANSWER, COMPILING, HeartbeatWriter


@contextlib.contextmanager
def beating(trainer: Any, heartbeat: HeartbeatWriter) -> Iterator[None]:
    """Inside it, what `trainer` computes beats."""
    with contextlib.ExitStack() as handles:
        handles.callback(_forwards(trainer, heartbeat).remove)
        for slot, layer in _engine(getattr(trainer, "vllm_generation", None), heartbeat):
            handles.callback(wrap(slot, layer, INNER).remove)
        handles.enter_context(beating_with_compiles(heartbeat))
        yield


def _forwards(trainer: Any, heartbeat: HeartbeatWriter) -> Any:
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.register_forward_pre_hook(lambda module, inputs: heartbeat.again())


def _engine(generation: Any, heartbeat: HeartbeatWriter) -> Iterator[tuple[AttributeSlot, Callable[..., Any]]]:
    """Layers on the steps of an engine in this process, and on what a server is asked to generate."""

    def step(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        heartbeat.again()
        return call_next(*args, **kwargs)

    def ask(call_next: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with heartbeat.within(ANSWER):
            return call_next(*args, **kwargs)

    engine = getattr(getattr(generation, "llm", None), "llm_engine", None)
    if engine is not None:
        yield AttributeSlot(engine, "step"), step
    client = getattr(generation, "vllm_client", None)
    if client is not None:
        yield AttributeSlot(client, "generate"), ask


@contextlib.contextmanager
def beating_with_compiles(heartbeat: HeartbeatWriter) -> Iterator[None]:
    """Inside it, Dynamo and Inductor beat where they begin and end to compile, forward or backward."""
    from torch._dynamo.callback import callback_handler

    under_way = contextlib.ExitStack()
    start = callback_handler.register_start_callback(lambda what: under_way.enter_context(heartbeat.within(COMPILING)))
    end = callback_handler.register_end_callback(lambda what: under_way.close())
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # `torch._dynamo.reset` has removed them
            callback_handler.remove_start_callback(start)
            callback_handler.remove_end_callback(end)
