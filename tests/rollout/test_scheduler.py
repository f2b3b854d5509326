"""The engine's seconds by the batch that took them, scheduled in the same step or ahead, on a clock made of paper."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_autotune.rollout.metrics.scheduler import EngineMeter, Turn

PREFILL_S, DECODE_S = 5.0, 1.0


class Engine:
    """One request of a prompt of 8 tokens and `answer` more, by `ahead` batches scheduled before the first returns."""

    def __init__(self, ahead: int, answer: int) -> None:
        self.ahead, self.left, self.now = ahead, answer, 0.0
        self.queue: deque[Any] = deque()
        self.scheduler = SimpleNamespace(
            schedule=self.schedule,
            update_from_output=lambda output, tokens: None,
            requests={"r": SimpleNamespace(num_prompt_tokens=8)},
            get_request_counts=lambda: (1, 0),
            kv_cache_manager=SimpleNamespace(usage=0.1),
        )
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
        self.computed = 0

    def schedule(self) -> Any:
        first = self.computed == 0
        tokens = 8 if first else 1
        new = [SimpleNamespace(req_id="r", num_computed_tokens=0, prompt_token_ids=[1] * 8)] if first else []
        again = ([], []) if first else (["r"], [self.computed])
        self.computed, self.left = self.computed + tokens, self.left - 1
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(req_ids=again[0], num_computed_tokens=again[1]),
            num_scheduled_tokens={"r": tokens},
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=None,
            seconds=PREFILL_S if first else DECODE_S,
        )

    def step(self) -> None:
        """As `EngineCore.step`, and `step_with_batch_queue` where batches are scheduled ahead."""
        if self.left:
            self.queue.append(self.scheduler.schedule())
            if self.left and len(self.queue) <= self.ahead:
                return
        batch = self.queue.popleft()
        self.now += batch.seconds
        self.scheduler.update_from_output(batch, None)

    def generate(self) -> None:
        while self.left or self.queue:
            self.step()


def metered(engine: Engine) -> Turn:
    llm = SimpleNamespace(llm_engine=engine, generate=engine.generate)
    generation = SimpleNamespace(llm=llm, sync_weights=lambda: None)
    meter = EngineMeter(generation, lambda: 0, lambda: True, clock=lambda: engine.now)
    handles = meter.install()
    llm.generate()
    for handle in handles:
        handle.remove()
    return meter.turns[0]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_seconds_belong_to_the_batch_whose_tokens_come_back(ahead: int) -> None:
    turn = metered(Engine(ahead, answer=4))
    assert (turn.prefill_s, turn.decode_s) == (PREFILL_S, 3 * DECODE_S)
    assert (turn.prefill_tokens, turn.decode_tokens, turn.decode_only_tokens) == (8, 3, 3)
    assert turn.running_s == PREFILL_S + 3 * DECODE_S and turn.generations == 1
