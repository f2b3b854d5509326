"""Counters of the engine's scheduler: step by step, what each request had computed.

Read off vLLM 0.31 (vllm/v1/core/sched/output.py). A colocated engine runs in this process, so its scheduler can be
asked without its statistics being on (TRL starts it without). A server is asked over HTTP (`metrics.server`).

With asynchronous scheduling the engine decides on a batch while the device works on the one before, so that a step's
seconds belong to the batch whose tokens come back in it (`step_with_batch_queue` in vllm/v1/engine/core.py).
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from grpo_autotune.records.rollout import EngineFacts
from grpo_autotune.rollout.parts import engine_of
from grpo_autotune.rollout.sync import sync
from grpo_autotune.seams.layers import AttributeSlot, Handle, Next, wrap

KEEP = 4096
"""Turns that are remembered."""


@dataclass(slots=True)
class Turn:
    """The engine's work after one optimizer step: what it summed over its own steps, and the largest of some."""

    step: int
    generations: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_only_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    running_s: float = 0.0
    images_encoded: int = 0
    preemptions: int = 0
    sleeps: int = 0
    sleep_s: float = 0.0
    wakes: int = 0
    wake_s: float = 0.0
    syncs: int = 0
    sync_s: float = 0.0
    running_max: int = 0
    waiting_max: int = 0
    kv_use_max: float = 0.0


@dataclass(slots=True)
class Scheduled:
    """Tokens and requests that one step of the engine computes; with chunked prefill it may prefill and decode."""

    prefill: int = 0
    decode: int = 0
    running: int = 0

    def and_then(self, other: "Scheduled") -> "Scheduled":
        """This and what was decided after it."""
        return Scheduled(self.prefill + other.prefill, self.decode + other.decode, max(self.running, other.running))


LARGEST = ("running_max", "waiting_max", "kv_use_max")


@dataclass
class EngineMeter:
    """Watches the colocated engine of one `VLLMGeneration` from `install` on."""

    generation: Any  # TRL's object that holds the engine
    step: Callable[[], int]  # returns the number of optimizer steps made
    counting: Callable[[], bool]  # True while what the engine does belongs to training
    clock: Callable[[], float] = time.perf_counter
    turns: deque[Turn] = field(default_factory=lambda: deque(maxlen=KEEP))
    _under_way: dict[int, Scheduled] = field(default_factory=dict)
    _returned: Scheduled | None = None
    _unbooked_s: float = 0.0

    def install(self) -> list[Handle]:
        """Put layers on the engine's step, its scheduler, its sleep and the weight sync; none without an engine."""
        llm = getattr(self.generation, "llm", None)
        engine, scheduler = getattr(llm, "llm_engine", None), scheduler_of(llm)
        slots = [(self.generation, "sync_weights", self._timed("sync"))]
        if scheduler is not None:
            slots.append((scheduler, "schedule", self._schedule_layer))
            slots.append((scheduler, "update_from_output", self._update_layer))
            slots.append((engine, "step", self._step_layer))
            slots.append((llm, "generate", self._generate_layer))
            slots += [(llm, "sleep", self._timed("sleep")), (llm, "wake_up", self._timed("wake"))]
        return [wrap(AttributeSlot(owner, name), layer) for owner, name, layer in slots if hasattr(owner, name)]

    def facts(self, first: int) -> EngineFacts | None:
        """The sums since optimizer step `first` (of all steps, if nothing came since); None before any generation."""
        total = together(self._seen(first))
        if not total.generations:
            return None
        busy_s = total.prefill_s + total.decode_s
        config = self.generation.llm.llm_engine.vllm_config.cache_config
        engine = engine_of(self.generation)
        return EngineFacts(
            **{name: getattr(total, name) for name in SAME},
            prefill_tokens_per_s=per(total.prefill_tokens, total.prefill_s),
            decode_tokens_per_s=per(total.decode_only_tokens, total.decode_s),
            running_mean=per(total.running_s, busy_s),
            kv_tokens=config.num_gpu_blocks * config.block_size if config.num_gpu_blocks else None,
            sleep_s=per(total.sleep_s, total.sleeps),
            wake_s=per(total.wake_s, total.wakes),
            sync_s=per(total.sync_s, total.syncs),
            start_s=None if engine is None else engine.start_s,
            **self._sync_facts(total.syncs),
        )

    def _sync_facts(self, syncs: int) -> dict[str, Any]:
        """Way and median bytes of the last syncs, where they are this package's own."""
        last = sync.facts(self.generation)[-syncs:] if syncs else []
        if not last:
            return {}
        return {"sync_way": last[-1].way, "sync_bytes": round(statistics.median(row.bytes for row in last))}

    def _seen(self, first: int) -> list[Turn]:
        return [turn for turn in self.turns if turn.step >= first and turn.generations] or list(self.turns)

    def _turn(self) -> Turn:
        step = self.step()
        if not self.turns or self.turns[-1].step != step:
            self.turns.append(Turn(step))
        return self.turns[-1]

    def _timed(self, what: str) -> Callable[..., Any]:
        count = {"sync": "syncs", "sleep": "sleeps", "wake": "wakes"}[what]

        def timed(call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
            begin = self.clock()
            answer = call_next(*args, **kwargs)
            if self.counting():
                turn = self._turn()
                setattr(turn, count, getattr(turn, count) + 1)
                setattr(turn, f"{what}_s", getattr(turn, f"{what}_s") + self.clock() - begin)
            return answer

        return timed

    def _generate_layer(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        self._unbooked_s = 0.0
        if self.counting():
            self._turn().generations += 1
        return call_next(*args, **kwargs)

    def _schedule_layer(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        output = call_next(*args, **kwargs)
        if self.counting():
            self._count(output)
        return output

    def _update_layer(self, call_next: Next, output: Any, /, *args: Any, **kwargs: Any) -> Any:
        work = self._under_way.pop(id(output), None)
        if work is not None:
            self._returned = work if self._returned is None else self._returned.and_then(work)
        return call_next(output, *args, **kwargs)

    def _step_layer(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        self._returned, begin = None, self.clock()
        outputs = call_next(*args, **kwargs)
        if self.counting():
            self._unbooked_s += self.clock() - begin
            if self._returned is not None:
                self._book(self._returned, self._unbooked_s)
                self._unbooked_s = 0.0
        return outputs

    def _book(self, work: Scheduled, seconds: float) -> None:
        turn = self._turn()
        turn.prefill_s += seconds if work.prefill else 0.0
        turn.decode_s += 0.0 if work.prefill else seconds
        turn.decode_only_tokens += 0 if work.prefill else work.decode
        turn.running_s += work.running * seconds

    def _count(self, output: Any) -> None:
        turn, scheduler, work = self._turn(), scheduler_of(self.generation.llm), Scheduled()
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        again = output.scheduled_cached_reqs
        starts |= dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        for request, tokens in output.num_scheduled_tokens.items():
            known = scheduler.requests.get(request)
            in_prompt = known is not None and starts.get(request, 0) < known.num_prompt_tokens
            if in_prompt or (tokens > 1 and request not in output.scheduled_spec_decode_tokens):
                work.prefill += tokens
            else:
                work.decode += tokens
        for new in output.scheduled_new_reqs:
            turn.prompt_tokens += len(new.prompt_token_ids or ())
            turn.cached_tokens += new.num_computed_tokens
        turn.prefill_tokens += work.prefill
        turn.decode_tokens += work.decode
        turn.images_encoded += sum(len(inputs) for inputs in output.scheduled_encoder_inputs.values())
        turn.preemptions += len(output.preempted_req_ids or ())
        work.running = len(output.num_scheduled_tokens)
        turn.running_max = max(turn.running_max, work.running)
        turn.waiting_max = max(turn.waiting_max, scheduler.get_request_counts()[1])
        turn.kv_use_max = max(turn.kv_use_max, scheduler.kv_cache_manager.usage)
        self._under_way[id(output)] = work


SAME = sorted({f.name for f in fields(Turn)} & set(EngineFacts.model_fields) - {"sleep_s", "wake_s", "sync_s"})
"""Facts that are sums or maxima of turns as they are."""


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine that runs in this process; None where it runs elsewhere."""
    core = getattr(getattr(getattr(llm, "llm_engine", None), "engine_core", None), "engine_core", None)
    return getattr(core, "scheduler", None)


def together(turns: Iterable[Turn]) -> Turn:
    """Several turns as one."""
    total = Turn(0)
    for turn in turns:
        for part in fields(Turn):
            mine, other = getattr(total, part.name), getattr(turn, part.name)
            setattr(total, part.name, max(mine, other) if part.name in LARGEST else mine + other)
    return total


def per(amount: float, by: float) -> float | None:
    """A rate or a mean; None where nothing was counted."""
    return amount / by if by else None
