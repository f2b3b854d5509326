"""An interleaved race: trials side by side run a block each in turn, so that the machine's load falls on all alike.

The order of blocks is reversed from round to round (A B, B A, A B, ...), so that a steady drift cancels out of the
differences.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean

from grpo_autotune.records.trial import TrialOutcome, TrialSpec
from grpo_autotune.trials.block_limit import blocks_done, set_block_limit
from grpo_autotune.trials.endings import Ending
from grpo_autotune.trials.parent.folder import prepare_folder
from grpo_autotune.trials.parent.watch import POLL_S, Attempt, AttemptEnd, Stopwatch, Watch
from grpo_autotune.trials.parent.worker import Worker

STOP_S = 30.0
"""Seconds for a trial that is told to stop, in which it ends its step and writes its outcome."""

LATE_S = 1.0
"""Seconds past the deadline after which a trial in the middle of a step is ended."""

AROUND_S = 60.0
"""Seconds that starting and ending a trial's process take at most."""

ALONE = "measured one after another, each block with a start of its own: together they do not fit into memory"


def fits_together(specs: Sequence[TrialSpec]) -> bool:
    """Return whether memory may hold all at once: an engine in the training process takes its share of the GPU for
    good, and two of them take more than there is."""
    return not any(spec.config.get("grpo", {}).get("use_vllm") for spec in specs)


def block_order(lanes: int, round_number: int) -> list[int]:
    """The trials in the order of their blocks in a round."""
    order = list(range(lanes))
    return order if round_number % 2 == 0 else order[::-1]


class Race(AbstractContextManager["Race"]):
    """The trials of one race and their workers. `start` gives a trial in its folder to a worker, and `watch` is called
    with the progress of the trial whose block runs. The clock tells monotonic seconds."""

    def __init__(
        self,
        run_dir: Path,
        specs: Sequence[TrialSpec],
        clock: Callable[[], float],
        wait: Callable[[float], None],
        start: Callable[[TrialSpec, Path], Worker],
        watch: Watch | None,
    ) -> None:
        self._wait, self._stopwatch = wait, Stopwatch(clock)
        self._start, self._clock, self._watch = start, clock, watch or (lambda progress: None)
        self._restarted: set[int] = set()
        self._lanes: list[Attempt] = []
        self._ends: dict[int, AttemptEnd] = {}
        self._steps: list[list[int]] = [[] for _ in specs]
        self._rounds = 0
        try:
            for spec in specs:
                folder = prepare_folder(run_dir, spec)
                set_block_limit(folder, 0)
                self._lanes.append(self._attempt(spec, folder))
        except BaseException:
            self.__exit__()
            raise

    def _attempt(self, spec: TrialSpec, folder: Path) -> Attempt:
        return Attempt(self._start(spec, folder), spec, folder, self._clock, self._watch)

    @property
    def elapsed_s(self) -> float:
        return self._stopwatch.look()

    def run(self, rounds: int, deadline_s: float) -> list[tuple[Attempt, AttemptEnd]]:
        """Start all, warm each up, interleave their blocks, and stop them; return the end of each."""
        everyone = range(len(self._lanes))
        self._until(lambda: all(self._is_waiting(lane, 0) for lane in everyone), deadline_s)
        for lane in everyone:
            self._run_block(lane, 1, deadline_s)
        longest_s = 0.0
        while not self._ends and self._rounds < rounds and self.elapsed_s + longest_s < deadline_s:
            begun_s = self.elapsed_s
            for lane in block_order(len(self._lanes), self._rounds):
                self._run_block(lane, self._rounds + 2, deadline_s)
            if self._ends or self.elapsed_s > deadline_s:
                break
            self._rounds += 1
            longest_s = max(longest_s, self.elapsed_s - begun_s)
        for attempt in self._lanes:
            attempt.idle = False
            set_block_limit(attempt.folder, None)
        stop_s = min(self.elapsed_s + STOP_S, deadline_s + LATE_S)
        self._until(lambda: len(self._ends) == len(self._lanes), stop_s, all_of_them=True)
        for lane, attempt in enumerate(self._lanes):
            if lane not in self._ends:
                attempt.worker.end()
                self._ends[lane] = AttemptEnd(Ending("timeout", "did not stop in time at the race's end"))
        return [(attempt, self._ends[lane]) for lane, attempt in enumerate(self._lanes)]

    def lacked_memory(self, outcomes: Sequence[TrialOutcome]) -> bool:
        """Return whether memory ran out before a single round was over, or an allocator had to make room,
        which costs the one that it happens to."""
        full = any(outcome.device_memory is not None and outcome.device_memory.retries for outcome in outcomes)
        return full or (self._rounds == 0 and any(outcome.status == "oom" for outcome in outcomes))

    def by_round(self, outcomes: Sequence[TrialOutcome]) -> list[TrialOutcome]:
        """The outcomes with one mean per round in place of each step's seconds."""
        return [
            outcome.model_copy(
                update={
                    "step_s": self._means(outcome.step_s, self._steps[lane]),
                    "living_shares": self._means(outcome.living_shares, self._steps[lane]),
                }
            )
            for lane, outcome in enumerate(outcomes)
        ]

    def release_worker(self, lane: int) -> Worker:
        """Hand out the worker of a trial that went well; the caller ends it."""
        return self._lanes.pop(lane).worker

    def __exit__(self, *exc: object) -> None:
        for attempt in self._lanes:
            attempt.worker.end()

    def _means(self, step_s: Sequence[float], after: Sequence[int]) -> list[float]:
        """Means of the rounds that all have: `after` counts the steps done by the end of the warm-up and each block."""
        warmup = after[0] if after else 0
        edges = [steps - warmup for steps in after[: self._rounds + 1]]
        blocks = [step_s[begin:end] for begin, end in itertools.pairwise(edges)]
        return [fmean(block) for block in blocks if block]

    def _run_block(self, lane: int, blocks: int, deadline_s: float) -> None:
        """Let one run until it has done so many blocks, the warm-up being the first."""
        attempt = self._lanes[lane]
        if self._ends:
            return
        attempt.idle = False
        set_block_limit(attempt.folder, blocks)
        self._until(lambda: self._is_waiting(lane, blocks), deadline_s)
        attempt.idle = True
        self._steps[lane].append(attempt.heartbeat.progress.step)

    def _is_waiting(self, lane: int, blocks: int) -> bool:
        attempt = self._lanes[lane]
        attempt.idle = blocks_done(attempt.heartbeat.progress.stage) == blocks
        return attempt.idle

    def _until(self, done: Callable[[], bool], deadline_s: float, all_of_them: bool = False) -> None:
        """Look at all until `done`, one of them ended (or all), or the time is up."""
        while True:
            for lane, attempt in enumerate(self._lanes):
                if lane not in self._ends and (end := attempt.look()) is not None:
                    if not end.taken_up and lane not in self._restarted:  # a warm worker that was about to end
                        self._restarted.add(lane)
                        attempt.worker.end()
                        self._lanes[lane] = self._attempt(attempt.spec, attempt.folder)
                        continue
                    self._ends[lane] = end
                    if end.ending is not None:
                        attempt.worker.end()
            if done() or (self._ends and not all_of_them) or self.elapsed_s > deadline_s:
                return
            self._wait(POLL_S)


def one_after_another(
    run: Callable[[TrialSpec, Watch | None], TrialOutcome],
    specs: Sequence[TrialSpec],
    rounds: int,
    deadline_s: float,
    clock: Callable[[], float] = time.monotonic,
    watch: Watch | None = None,
) -> list[TrialOutcome]:
    """The same order with a trial for each block; the figures beside the rounds' are the last block's."""
    by_lane: list[list[TrialOutcome]] = [[] for _ in specs]
    longest_s, spent_s, done = 0.0, 0.0, 0
    while done < rounds and spent_s + longest_s < deadline_s:
        begun_s = spent_s
        for lane in block_order(len(specs), done):
            left_s = max(1.0, deadline_s - spent_s)
            spec, before_s = specs[lane].model_copy(update={"limit_s": min(specs[lane].limit_s, left_s)}), clock()
            by_lane[lane].append(run(spec, watch))
            spent_s += _seconds(clock() - before_s, by_lane[lane][-1].elapsed_s)
        done += 1
        longest_s = max(longest_s, spent_s - begun_s)
        if any(outcomes[-1].status != "ok" for outcomes in by_lane):
            break
    return [_together(spec, outcomes) for spec, outcomes in zip(specs, by_lane, strict=True)]


def _seconds(passed: float, elapsed_s: float) -> float:
    """Seconds of a trial by the clock, its process's start and end included, unless the clock has jumped meanwhile."""
    return passed if elapsed_s <= passed <= elapsed_s + AROUND_S else elapsed_s


def _together(spec: TrialSpec, outcomes: Sequence[TrialOutcome]) -> TrialOutcome:
    if not outcomes:
        return TrialOutcome(number=spec.number, status="timeout", why="no time was left for a round", notes=[ALONE])
    blocks, last = [outcome for outcome in outcomes if outcome.status == "ok" and outcome.step_s], outcomes[-1]
    shares = [fmean(block.living_shares) for block in blocks if block.living_shares]
    rounds = {"step_s": [fmean(block.step_s) for block in blocks], "living_shares": shares}
    record = blocks[-1].record if blocks else last.record
    return last.model_copy(update={**rounds, "record": record, "notes": [*last.notes, ALONE]})
