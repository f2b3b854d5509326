"""Reward functions start when completions exist, and run beside the old-policy and reference passes.

TRL calls them after those passes, on the main thread. Async functions start at once on TRL's own event loop; a sync
function does so on a thread of its own where its author says that it may (`beside`): timeouts by signal, as in
math_verify, only work on the main thread. Results are handed to TRL where it asks for them, so that order, checks,
exceptions and the gathering over processes stay where they were. A function that starts early gets copies: it may write
into what it is given while the passes still read it.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from grpo_autotune.seams.layers import INNER, Next, is_async
from grpo_autotune.seams.table import wrap_seams
from grpo_autotune.speedups.base import Installed
from grpo_autotune.speedups.conditions import GENERATION
from grpo_autotune.speedups.images.lazy_rows import copied

ALLOWED = "may_run_beside"
"""Attribute of a sync reward function that may run on a thread of its own."""

NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that TRL does not hand to reward functions."""

Function = TypeVar("Function", bound=Callable[..., Any])


def beside(function: Function) -> Function:
    """Allow a sync reward function to run on another thread, beside the training process's own work (a decorator)."""
    setattr(function, ALLOWED, True)
    return function


class RewardOverlap:
    """The speed-up."""

    name = "reward_overlap"
    summary = "reward functions run beside the old-policy and reference passes"
    stands_for = (*GENERATION, "_generate", "_calculate_rewards")

    def applies(self, trainer: Any) -> str | None:
        """None where there is a function that may move and something to hide it behind."""
        if not _moving(trainer):
            return "no function of `rewards` is async, and none was allowed to run beside training (`beside`)"
        if not _has_pass(trainer):
            no_pass = "between generation and rewards there is no pass to hide behind"
            return f"grpo.beta is 0 and grpo.use_vllm is false: {no_pass}"
        if getattr(trainer, "resampling", None) is not None:
            return "resample needs the rewards before those passes"
        if trainer.rollout_func is not None:
            return "rollout_func: what it returns is given to the rewards after those passes"
        return None

    def install(self, trainer: Any) -> Installed:
        """Put layers on the generation, on its scoring and on the rewards."""
        installed = _Beside(self.name, trainer)
        layers = {"score": installed.score, "rollout": installed.rollout, "rewards": installed.rewards}
        installed.handles += wrap_seams(trainer, INNER, **layers)
        return installed


def _moving(trainer: Any) -> list[int]:
    """Indices of the reward functions that may start early."""
    return [
        index
        for index, function in enumerate(trainer.reward_funcs)
        if not hasattr(function, "parameters") and (is_async(function) or getattr(function, ALLOWED, False))
    ]


def _has_pass(trainer: Any) -> bool:
    """True if TRL computes log-probs between generation and rewards (`_generate_and_score_completions`)."""
    cycle = trainer.args.steps_per_generation * trainer.num_iterations
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return bool(trainer.beta != 0.0 or corrected or trainer.args.gradient_accumulation_steps % cycle)


class _Started(NamedTuple):
    """Functions under way: the completions they judge, and a future by position in `reward_funcs`."""

    prompts: Any
    completions: Any
    futures: dict[int, Future[Any]]


class _Beside(Installed):
    """Layers of one trainer, and how long its rewards ran and were waited for."""

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__(name)
        self.trainer = trainer
        self._inputs: Any = None
        self._started: _Started | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._facts = {"calls": 0.0, "busy_s": 0.0, "waited_s": 0.0}

    def facts(self) -> dict[str, float]:
        """Calls that started early, their seconds, and the seconds that the main thread waited for them."""
        return {**self._facts, "hidden_s": max(0.0, self._facts["busy_s"] - self._facts["waited_s"])}

    def remove(self) -> None:
        """Take every layer out; may be called twice."""
        super().remove()
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None

    def score(self, call_next: Next, /, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Know the rows; whatever ends the generation early also ends what was started for it."""
        self._inputs = inputs
        try:
            return call_next(inputs, *args, **kwargs)
        finally:
            self._inputs = None
            if self._started is not None:
                for future in self._started.futures.values():
                    future.cancel()
            self._started = None

    def rollout(self, call_next: Next, /, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        """Start as soon as the completions are there."""
        output = call_next(prompts, *args, **kwargs)
        if self._inputs is not None and not self.fell_back:
            completions = output[3]
            values = {"prompts": prompts, "completions": completions, "completion_ids": output[1]}
            given = self._columns() | {name: copied(rows) for name, rows in values.items()}
            moving = _moving(self.trainer)
            futures = {index: self._start(self.trainer.reward_funcs[index], given) for index in moving}
            self._started = _Started(prompts, completions, futures)
        return output

    def rewards(
        self, call_next: Next, /, inputs: Any, prompts: Any, completions: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """TRL's own method, over functions that hand out what is under way."""
        started, self._started = self._started, None
        if started is None or started.prompts is not prompts or started.completions is not completions:
            return call_next(inputs, prompts, completions, *args, **kwargs)
        functions = self.trainer.reward_funcs
        others = list(functions)
        try:
            for index, future in started.futures.items():
                functions[index] = self._ready(others[index], future)
            return call_next(inputs, prompts, completions, *args, **kwargs)
        finally:
            functions[:] = others

    def _start(self, function: Any, given: dict[str, Any]) -> Future[Any]:
        self._facts["calls"] += 1
        if is_async(function):
            return asyncio.run_coroutine_threadsafe(self._awaited(function, given), self.trainer.async_loop)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="rewards")  # one: in their order, as TRL calls them
        return self._pool.submit(self._called, function, given)

    def _columns(self) -> dict[str, Any]:
        """Arguments of a reward function beside the completions, as `_calculate_rewards` gathers it."""
        trainer, rows = self.trainer, self._inputs
        columns = {name: copied(row[name] for row in rows) for name in rows[0] if name not in NOT_COLUMNS}
        columns["trainer_state"] = trainer.state
        columns["log_extra"], columns["log_metric"] = trainer._log_completion_extra, trainer._log_metric
        if trainer.environments is not None:
            columns["environments"] = trainer.environments
        return columns

    @contextmanager
    def _counted(self, fact: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._facts[fact] += time.perf_counter() - begin

    async def _awaited(self, function: Any, given: dict[str, Any]) -> Any:
        with self._counted("busy_s"):
            return await function(**given)

    def _called(self, function: Any, given: dict[str, Any]) -> Any:
        with self._counted("busy_s"):
            return function(**given)

    def _ready(self, function: Any, future: Future[Any]) -> Callable[..., Any]:
        """A function of the same kind that returns, or raises, what the started one does."""
        if is_async(function):

            async def awaited(**given: Any) -> Any:
                with self._counted("waited_s"):
                    return await asyncio.wrap_future(future)

            return awaited

        def called(**given: Any) -> Any:
            with self._counted("waited_s"):
                return future.result()

        return called
