"""Signs of life inside one span of a trial: forwards, replayed steps, an engine's steps, a server's answers, compiling.

A span may hold the sampling of thousands of tokens, by the model or by an engine, and a first forward may compile for
minutes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from grpo_autotune.seams.layers import INNER, AttributeSlot, Next, wrap
from grpo_autotune.seams.trainer_access import base_of
from grpo_autotune.speedups.generation.step import GraphStep
from grpo_autotune.trials.heartbeat import ANSWER, COMPILING, HeartbeatWriter


@contextlib.contextmanager
def beating(trainer: Any, heartbeat: HeartbeatWriter) -> Iterator[None]:
    """Inside it, what `trainer` computes beats."""
    base = base_of(trainer.accelerator.unwrap_model(trainer.model))
    with contextlib.ExitStack() as handles:
        handles.callback(base.register_forward_pre_hook(lambda module, inputs: _beat_eagerly(heartbeat)).remove)
        for slot, layer in _elsewhere(base, getattr(trainer, "vllm_generation", None), heartbeat):
            handles.callback(wrap(slot, layer, INNER).remove)
        handles.enter_context(beating_with_compiles(heartbeat))
        yield


def _beat_eagerly(heartbeat: HeartbeatWriter) -> None:
    """Beat, but leave no break in a graph that is being compiled."""
    if not torch.compiler.is_compiling():
        heartbeat.again()


def _elsewhere(
    base: Any, generation: Any, heartbeat: HeartbeatWriter
) -> Iterator[tuple[AttributeSlot, Callable[..., Any]]]:
    """Layers on the steps of an engine in this process, on replays of a captured step, which call no forward, and on
    what a server or another thread is asked to generate."""

    def step(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        heartbeat.again()
        return call_next(*args, **kwargs)

    def ask(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        with heartbeat.within(ANSWER):
            return call_next(*args, **kwargs)

    engine = getattr(getattr(generation, "llm", None), "llm_engine", None)
    asked = ((getattr(generation, "vllm_client", None), "generate"), (base, "generate_batch"))
    steps = ((engine, "step"), (GraphStep, "__call__"))
    slots = [*((owner, name, step) for owner, name in steps), *((owner, name, ask) for owner, name in asked)]
    for owner, name, layer in slots:
        if hasattr(owner, name):
            yield AttributeSlot(owner, name), layer


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
