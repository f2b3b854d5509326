"""What ranks do together is told apart from the work of the stage that it happens in.

One process is a group of its own over gloo, in which collectives and DDP run as they do with more; `fully_shard`, which
sends nothing then, has a group whose other rank is torch's stand-in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.distributed_c10d import ProcessGroup, Work
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from grpo_autotune.probe.collectives import Collectives
from grpo_autotune.probe.spans import SpanRecorder
from grpo_autotune.probe.stages import stages_of
from grpo_autotune.seams.layers import take_off
from tests.probe.test_spans import Clock

GATHER, REDUCE, EXCHANGE = "gather_parameters", "reduce_gradients", "exchange"


@pytest.fixture
def ranks() -> int:
    return 1


@pytest.fixture(autouse=True)
def group(ranks: int, tmp_path: Path) -> Iterator[None]:
    if ranks == 1:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    yield
    dist.destroy_process_group()


class Watched:
    """A recorder inside a step, with the layers on."""

    def __init__(self, model: Any = None, *, use_vllm: bool = False, timer: Any = None) -> None:
        self.clock = Clock()
        self.recorder = SpanRecorder(self.clock, timer=timer)
        accelerator = SimpleNamespace(num_processes=2)
        trainer = SimpleNamespace(accelerator=accelerator, use_vllm=use_vllm, model_wrapped=model)
        self.collectives = Collectives(self.recorder, trainer)
        self.handles = self.collectives.install()
        self.recorder.open_root()

    def seen(self) -> list[tuple[str, str]]:
        """Stage of the work that a collective was taken out of, and its part, in order; equal neighbours once."""
        take_off(self.handles)
        spans = self.recorder.close_root(1).spans
        rows = [(spans[span.parent].stage, span.part) for span in spans if span.stage == "sync_wait"]
        return [row for n, row in enumerate(rows) if n == 0 or rows[n - 1] != row]


@pytest.fixture
def watched() -> Iterator[Watched]:
    one = Watched()
    yield one
    take_off(one.handles)


def gather(**options: Any) -> Any:
    return dist.all_gather([torch.zeros(2)], torch.ones(2), **options)


def test_a_collective_is_named_by_what_it_moves_and_where(watched: Watched) -> None:
    span = watched.recorder.span
    with span("policy_logprob"):
        gather()
    with span("backward"):
        dist.reduce_scatter(torch.zeros(2), [torch.ones(2)])
        dist.all_reduce(torch.ones(2))
    with span("optimizer"):
        gather()
        all_reduce(torch.ones(2), "sum", dist.group.WORLD).trigger_wait()  # as DTensor sums a norm
    with span("reward"):
        gather()
        dist.barrier()
    with span("policy_logprob"):
        dist.broadcast(torch.ones(2), 0)
    assert watched.seen() == [
        ("policy_logprob", GATHER), ("backward", REDUCE), ("optimizer", GATHER), ("optimizer", REDUCE),
        ("reward", EXCHANGE), ("policy_logprob", EXCHANGE),
    ]  # fmt: skip


def test_a_result_that_is_awaited_later_keeps_its_name_and_the_books_balance(watched: Watched) -> None:
    with watched.recorder.span("backward"):
        watched.clock.wait(1.0)
        first, second = gather(async_op=True), dist.all_reduce(torch.ones(2), async_op=True)
        second.wait()
        watched.clock.wait(2.0)
        first.wait()
    take_off(watched.handles)
    step = stages_of(watched.recorder.close_root(1))
    assert {part for stage, part in step.parts if stage == "sync_wait"} == {GATHER, REDUCE}
    assert step.self_s["backward"] == 3.0 and sum(step.self_s.values()) == step.wall_s


def test_what_is_a_wait_already_or_counts_apart_is_no_second_one(watched: Watched) -> None:
    with watched.recorder.span("sync_wait", "exchange"):
        gather()
    with watched.recorder.span("log_save_eval", "save"):
        gather()
    with watched.recorder.span("reward"):
        thread = threading.Thread(target=gather)
        thread.start()
        thread.join()
    assert watched.seen() == [("", EXCHANGE)]  # the seam's own


def test_an_engine_of_several_gpus_talks_within_generation() -> None:
    watched = Watched(use_vllm=True)
    with watched.recorder.span("generation"):
        dist.all_reduce(torch.ones(2))
    assert watched.seen() == []


def test_nothing_stays_behind() -> None:
    before = dict(vars(ProcessGroup)), dict(vars(Work))
    watched = Watched()
    assert vars(Work)["wait"] is not before[1]["wait"]
    watched.seen()
    assert (dict(vars(ProcessGroup)), dict(vars(Work))) == before


def test_ddp_waits_for_its_gradients_at_the_end_of_the_backward_pass() -> None:
    model = DistributedDataParallel(nn.Linear(4, 4))
    watched = Watched(model)
    for synced in (False, True):
        model.require_backward_grad_sync = synced
        loss = model(torch.ones(2, 4)).sum()
        with watched.recorder.span("backward"):
            watched.collectives.begin_backward(loss)
            loss.backward()
    assert watched.seen() == [("backward", REDUCE)]


@pytest.mark.parametrize("ranks", [2])
def test_fsdp2_gathers_before_each_pass_and_reduces_after_it(ranks: int) -> None:
    mesh = dist.init_device_mesh("cpu", (ranks,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    watched = Watched(model)
    with watched.recorder.span("policy_logprob", "training_forward"):
        loss = model(torch.ones(2, 4)).sum()
    with watched.recorder.span("backward"):
        loss.backward()
    rows = watched.seen()
    assert rows[0] == ("policy_logprob", GATHER)
    assert {("backward", GATHER), ("backward", REDUCE)} <= set(rows)


class Stream:
    """A CUDA stream as far as waiting goes."""

    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event: ...


class Timer:
    def mark(self) -> float:
        return 0.0


def test_on_cuda_the_computing_stream_waits_and_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    computing, other, copies = Stream(), Stream(), Stream()
    under_way = [computing]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: under_way[-1])
    watched = Watched(timer=Timer())
    span = watched.recorder.span

    def beside(collective: Any) -> Event:
        under_way.append(other)
        collective()
        under_way.pop()
        return other.record_event()

    with span("policy_logprob"):
        gathered = beside(gather)  # runs beside the step
        other.wait_stream(computing)
    with span("backward"):
        computing.wait_stream(copies)  # no collective
        computing.wait_event(gathered)
        reduced = beside(lambda: dist.all_reduce(torch.ones(2)))
        computing.wait_event(gathered)
        computing.wait_event(reduced)
    with span("optimizer"):
        other.synchronize()
    with span("generation"):
        gather()  # on the computing stream
    assert watched.seen() == [
        ("backward", GATHER), ("backward", REDUCE), ("optimizer", REDUCE), ("generation", GATHER),
    ]  # fmt: skip
