"""The runner with real worker processes: warm and fresh, races, ranks, clocks that jump, and nobody left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from grpo_autotune.hardware.places import Place
from grpo_autotune.records.probe import DeviceMemory
from grpo_autotune.records.trial import Progress, TrialOutcome, TrialSpec
from grpo_autotune.trials.parent.interleave import ALONE, Race, block_order, one_after_another
from grpo_autotune.trials.parent.runner import Runner, worker_key
from grpo_autotune.trials.parent.watch import Stopwatch
from grpo_autotune.trials.parent.worker import Worker
from tests.support.trials import marked, processes, spec_of, wait_until_none

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "train_grpo.py"


class JumpingClock:
    """The real clock, until it leaps a day ahead and later two days back."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        leap = 86400.0 if self.calls > 5 else 0.0
        return time.monotonic() + leap - (172800.0 if self.calls > 10 else 0.0)


def remembered(path: Path) -> list[dict[str, list[float]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_warm_worker_trains_as_a_fresh_one_did_whatever_its_clock(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials in one process: equal losses and completions; then the runner is interrupted, and nothing is left.

    The current folder has one called `vllm`, which is nobody's vLLM.
    """
    (tmp_path / "here" / "vllm").mkdir(parents=True)
    (tmp_path / "here" / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path / "here")
    said: list[Progress] = []
    notes = [tmp_path / "fresh", tmp_path / "warm"]
    found = []
    monkeypatch.setenv("REMEMBERED", str(tmp_path / "both"))
    with marked(monkeypatch) as mark, Runner(tmp_path, clock=JumpingClock()) as runner:
        for number, note in enumerate(notes):
            spec = spec_of(
                tiny("qwen3"), tmp_path, number, "tests.support.faults:remembers", steps=3, hang_s=60, limit_s=300
            )
            found.append(runner.run(spec, said.append))
            (tmp_path / "both").rename(note)
        assert [outcome.status for outcome in found] == ["ok", "ok"], found
        assert [outcome.warm for outcome in found] == [False, True]
        pids = processes(mark)
        assert pids

        def interrupt(progress: Progress) -> None:
            if progress.step == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            runner.run(spec_of(tiny("qwen3"), tmp_path, 2), interrupt)
        assert processes(mark) == []
    assert len(remembered(notes[0])) == 4 and len(remembered(notes[0])[3]["losses"]) == 3
    assert remembered(notes[0]) == remembered(notes[1])
    stages = {progress.stage for progress in said}
    assert "start-up: model" in stages and stages & {"generation", "reward", "backward", "optimizer"}
    assert (said[-1].step, said[-1].of) == (4, 4)
    _check_outcome(found[1], tmp_path)


def _check_outcome(outcome: TrialOutcome, run_dir: Path) -> None:
    assert outcome.record is not None and outcome.record.timings.warmup_s and len(outcome.step_s) == 3
    assert outcome.peak_bytes is not None and outcome.idle_bytes is not None
    assert outcome.peak_bytes >= outcome.idle_bytes > 0
    assert outcome.startup_s is not None and 0 < outcome.startup_s <= outcome.elapsed_s < 3600
    folder = run_dir / "trials" / "0001"
    assert TrialOutcome.model_validate_json((folder / "outcome.json").read_text()) == outcome
    assert {path.name for path in folder.iterdir()} == {
        "spec.json", "heartbeat", "log.txt", "spans.jsonl", "outcome.json",
    }  # fmt: skip


def test_a_race_runs_in_turns_on_the_same_prompts(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.stage.startswith("waiting"):
            turns.append(progress.stage[-1])

    lengths = {"completion_lengths": [6]}
    specs = [
        spec_of(tiny("qwen3"), tmp_path, number, "tests.support.faults:remembers", grpo=grpo, **lengths)
        for number, grpo in enumerate(({}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}))
    ]
    monkeypatch.setenv("REMEMBERED", str(tmp_path / "calls"))
    with marked(monkeypatch) as mark, Runner(tmp_path) as runner:
        retiring = spec_of(tiny("qwen3"), tmp_path, 9, "tests.support.faults:keeps_the_trainer", steps=1)
        assert runner.run(retiring).status == "ok"  # its worker ends by itself, as the race may find out late
        outcomes = runner.race(specs, rounds=2, deadline_s=280, watch=watch)
        assert [outcome.status for outcome in outcomes] == ["ok", "ok"], outcomes
        warm = runner.run(spec_of(tiny("qwen3"), tmp_path, 2, purpose="rewards", steps=2))
        later = [spec.model_copy(update={"number": 3 + number}) for number, spec in enumerate([*specs, specs[1]])]
        several = runner.race(later, rounds=1, deadline_s=280)
        assert [(outcome.warm, len(outcome.step_s)) for outcome in several] == [(True, 1), (True, 1), (False, 1)]
        assert runner.has_pair and len(processes(mark)) >= 2
        worst = runner.run(spec_of(tiny("qwen3"), tmp_path, 9, purpose="worst_case", steps=1))
        assert worst.status == "ok" and worst.warm and not runner.has_pair
    assert processes(mark) == []
    assert [len(outcome.step_s) for outcome in outcomes] == [2, 2]
    assert turns == ["0", "0", "1", "1", "2", "2", "3", "3"]
    for outcome in outcomes:
        assert outcome.record is not None and outcome.notes == []
        steps = outcome.record.timings.step_s[:4]
        assert outcome.step_s == pytest.approx([(steps[0] + steps[1]) / 2, (steps[2] + steps[3]) / 2])
    assert warm.warm and [row.prompt for row in warm.rewards] == [0, 1, 2, 3]
    assert all(len(row.rewards) == 4 and row.truncated <= 4 for row in warm.rewards)


@pytest.mark.parametrize("purpose", ["timed", "probe"])
def test_a_prepared_worker_has_loaded_before_its_trial(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    with marked(monkeypatch), Runner(tmp_path) as runner:
        runner.prepare()
        begun_s = time.monotonic()
        while runner.is_loading:
            time.sleep(0.01)
        loaded_s = time.monotonic() - begun_s
        outcome = runner.run(spec_of(tiny("qwen3"), tmp_path, purpose=purpose, steps=1))
        took_s = time.monotonic() - begun_s - loaded_s
    assert outcome.status == "ok" and outcome.startup_s is not None and loaded_s > 1.0
    if purpose == "probe":  # which tells what a start takes
        assert not outcome.warm and outcome.startup_s > loaded_s and outcome.elapsed_s > took_s
    else:
        assert outcome.warm and outcome.startup_s < loaded_s


@pytest.mark.slow
def test_a_worker_that_is_ended_while_it_loads_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with marked(monkeypatch) as mark, Runner(tmp_path) as runner:
        runner.prepare()
        assert runner.is_loading and len(list(tmp_path.iterdir())) == 1
    assert processes(mark) == [] and not list(tmp_path.iterdir())


def test_speed_ups_leave_a_worker_as_warm_as_plain_trl(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (spec_of(tiny("qwen3"), tmp_path, number) for number in range(2))
    fast = first.model_copy(update={"config": {**first.config, "speedups": "auto"}})
    with marked(monkeypatch), Runner(tmp_path) as runner:
        outcomes = [runner.run(fast), runner.run(second)]
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"], outcomes
    assert outcomes[0].record is not None and "shared_prefix" in outcomes[0].record.trainer.speedups
    assert outcomes[1].warm


def test_of_two_workers_side_by_side_one_is_killed(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    places = [Place(str(core), cores=(core,)) for core in (cores[0], cores[-1])]
    seen: list[set[tuple[int, ...]]] = [set(), set()]

    def watch(number: int, progress: Progress) -> None:
        worker = runners[number]._worker
        if progress.step and worker is not None:
            child = psutil.Process(worker.pid).children()[0]
            seen[number].add(tuple(child.cpu_affinity() or ()))
            if number == 0:
                child.kill()

    with marked(monkeypatch) as mark, contextlib.ExitStack() as stack:
        pinned: list[dict[str, Any]] = [{"spawn": partial(Worker, place=places[0])}, {}]
        runners = [stack.enter_context(Runner(tmp_path, **more)) for more in pinned]
        given: list[dict[str, Any]] = [{}, {"cores": places[1].cores}]  # a process of all cores keeps to some of them
        specs = [spec_of(tiny("qwen3"), tmp_path, number, steps=1, **more) for number, more in enumerate(given)]
        trials = {n: runners[n].start(spec, partial(watch, n)) for n, spec in enumerate(specs)}
        outcomes: dict[int, TrialOutcome] = {}
        while trials:
            for number, trial in list(trials.items()):
                try:
                    next(trial)
                except StopIteration as end:
                    outcomes[number] = end.value
                    del trials[number]
            time.sleep(0.01)
        assert outcomes[0].status == "killed" and "SIGKILL" in (outcomes[0].why or "")
        assert outcomes[1].status == "ok" and seen == [{places[0].cores}, {places[1].cores}]
        again = runners[1].run(spec_of(tiny("qwen3"), tmp_path, 3, steps=1), partial(watch, 1))
        assert again.warm and seen[1] == {places[1].cores, tuple(cores)}
        stopped = runners[1].start(spec_of(tiny("qwen3"), tmp_path, 2))
        next(stopped)
        assert processes(mark)
        stopped.close()  # as Ctrl-C does
        assert processes(mark) == []


def test_two_processes_under_torchrun(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a place, as those of one of several workers."""
    spec = spec_of(tiny("qwen3"), tmp_path, world_size=2, grpo={"gradient_accumulation_steps": 1})
    cores, seen = tuple(sorted(os.sched_getaffinity(0))[:2]), set[tuple[int, ...]]()

    def watch(progress: Progress) -> None:
        if progress.step:
            seen.update(tuple(psutil.Process(pid).cpu_affinity() or ()) for pid in processes(mark))

    with (
        marked(monkeypatch) as mark,
        Runner(tmp_path, spawn=partial(Worker, place=Place("two cores", cores=cores))) as runner,
    ):
        outcome = runner.run(spec, watch)
        assert processes(mark) == []
    assert seen == {cores}
    assert outcome.status == "ok", outcome.why
    assert outcome.record is not None and outcome.record.trainer.world_size == 2
    assert len(outcome.record.ranks) == 2 and len(outcome.step_s) == 2
    assert not outcome.warm and worker_key(spec) is None


def key_of(vllm: dict[str, Any] | None = None, **grpo: Any) -> str | None:
    base = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 4}
    config = {"model": {"name_or_path": "m"}, "grpo": {**base, "use_vllm": True, **grpo}, "vllm": vllm or {}}
    return worker_key(TrialSpec(number=0, config=config))


def test_trials_share_an_engine_that_is_built_the_same() -> None:
    plain = key_of()
    same_generation = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    assert key_of(beta=0.1) == key_of(max_completion_length=7) == key_of(**same_generation) == plain
    assert key_of({"max_num_seqs": 16}) == plain  # what TRL gives anyway
    assert key_of({"weight_sync": "merged"}) == key_of({"weight_sync": "batched"})
    others = [
        key_of({"max_num_seqs": 8}),
        key_of({"max_num_batched_tokens": 2048}),
        key_of({"gpu_memory_utilization": 0.5}),
        key_of({"sleep_level": 1}),
        key_of({"weight_sync": "adapter"}),
        key_of(gradient_accumulation_steps=8),
        key_of(use_vllm=False),
        key_of({"mode": "server"}, beta=0.1),
        key_of({"server_gpus": 0}),
        key_of({"server_gpus": 1, "weight_sync": "adapter"}),
    ]
    assert plain not in others and len(set(others)) == len(others) - 1
    assert key_of(use_vllm=False) == key_of({"mode": "server"})  # no engine in the process
    assert key_of({"server_gpus": 1}) is None  # TRL's push keeps a port


def test_a_script_takes_the_trials_values(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "model"))
    knobs = {"grpo.num_generations": 4, "per_device_train_batch_size": 4}
    script = [str(SCRIPT), str(tiny("qwen3")), "500"]
    with marked(monkeypatch) as mark, Runner(tmp_path) as runner:
        outcome = runner.run(TrialSpec(number=0, config={}, script=script, knobs=knobs, completion_lengths=[3]))
        assert outcome.status == "ok", outcome.why
        assert processes(mark) == []
        unknown = runner.run(TrialSpec(number=1, config={}, script=script, knobs={"grpo.num_generation": 4}))
    assert outcome.record is not None and outcome.record.tokens is not None
    assert outcome.record.trainer.num_generations == 4 and outcome.record.trainer.per_device_train_batch_size == 4
    assert outcome.record.tokens.completion.max == 3
    assert (unknown.status, unknown.why) == ("invalid", "grpo.num_generation: GRPOConfig has no such key")


PARENT = """
import sys
from pathlib import Path
from grpo_autotune.trials.parent.runner import Runner
from grpo_autotune.records.trial import TrialSpec
Runner(Path(sys.argv[1])).run(TrialSpec.model_validate_json(Path(sys.argv[2]).read_text()))
"""


def test_nothing_outlives_a_parent_that_is_killed(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass hangs, and the reward has started a process in a session of its own."""
    (tmp_path / "spec.json").write_text(
        spec_of(tiny("qwen3"), tmp_path, reward="tests.support.faults:hangs").model_dump_json()
    )
    with marked(monkeypatch) as mark:
        parent = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path, tmp_path / "spec.json"], cwd=ROOT)
        while len(processes(mark)) < 4:  # parent, guardian, worker, and what the reward started
            assert parent.poll() is None
            time.sleep(0.2)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert wait_until_none(mark) == []


def test_a_clock_that_jumps_counts_for_nothing() -> None:
    times = iter([0.0, 1.0, 90000.0, 90002.0, 3.0, 4.0])
    stopwatch = Stopwatch(lambda: next(times))
    assert [stopwatch.look() for _ in range(5)] == [1.0, 1.0, 3.0, 3.0, 4.0]


def test_the_order_of_blocks_is_reversed_from_round_to_round() -> None:
    assert [block_order(2, number) for number in range(4)] == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert block_order(3, 1) == [2, 1, 0]


class NeverAtRest:
    """A worker in the middle of a step that is longer than the race."""

    ended = False

    def poll(self) -> None:
        return None

    def end(self) -> None:
        self.ended = True


def test_a_race_keeps_its_deadline_whatever_a_step_takes(tmp_path: Path) -> None:
    now, workers = [0.0], list[NeverAtRest]()

    def start(spec: TrialSpec, folder: Path) -> Worker:
        workers.append(NeverAtRest())
        return cast(Worker, workers[-1])

    def wait(seconds: float) -> None:
        now[0] += 50 * seconds

    specs = [TrialSpec(number=number, config={}) for number in (3, 4)]
    with Race(tmp_path, specs, lambda: now[0], wait, start, None) as race:
        seen = [end.ending.status for _, end in race.run(5, 20.0) if end.ending]
    assert seen == ["timeout", "timeout"] and all(worker.ended for worker in workers)
    assert 20.0 < now[0] <= 23.0


@pytest.mark.parametrize(("retries", "status", "lacked"), [(0, "ok", False), (2, "ok", True), (0, "oom", True)])
def test_a_race_without_room_for_both_is_none(tmp_path: Path, retries: int, status: Any, lacked: bool) -> None:
    figures = dict.fromkeys(DeviceMemory.model_fields, 0) | {"retries": retries}
    outcomes = [
        TrialOutcome(number=3, status="ok"),
        TrialOutcome(number=4, status=status, device_memory=DeviceMemory(**figures)),
    ]
    with Race(tmp_path, [], time.monotonic, time.sleep, lambda *_: pytest.fail("no trial"), None) as race:
        assert race.lacked_memory(outcomes) is lacked


def test_a_round_of_several_steps_has_the_mean_of_their_seconds_and_of_what_they_trained_on(tmp_path: Path) -> None:
    outcome = TrialOutcome(
        number=3, status="ok", step_s=[1.0, 3.0, 2.0, 4.0, 9.0], living_shares=[0.0, 1.0, 0.5, 1.0, 1.0]
    )
    with Race(tmp_path, [], time.monotonic, time.sleep, lambda *_: pytest.fail("no trial"), None) as race:
        race._rounds, race._steps = 2, [[2, 4, 6, 7]]  # two steps to warm up, two rounds, and one broken off
        (even,) = race.by_round([outcome])
        (plain,) = race.by_round([outcome.model_copy(update={"living_shares": []})])
    assert even.step_s == plain.step_s == [2.0, 3.0] and even.living_shares == [0.5, 0.75] and plain.living_shares == []


def test_a_child_that_waits_for_its_turn_looks_ever_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_autotune.trials.child.blocks import BlockSchedule

    now, looks = [0.0], list[float]()

    def limit(folder: Path) -> int | None:
        looks.append(now[0])
        return 0 if now[0] < 60.0 else 1

    def sleep(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr("grpo_autotune.trials.child.blocks.time", clock)
    monkeypatch.setattr("grpo_autotune.trials.child.blocks.block_limit", limit)
    child = BlockSchedule.__new__(BlockSchedule)
    child._trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    child._folder, child._block, child._first, child._last = tmp_path, 1, 0, 0
    child._heartbeat = cast(Any, SimpleNamespace(beat=lambda stage: None))
    child._probe = SimpleNamespace(warmup=1, recorder=SimpleNamespace(open_root=lambda: None))
    child._hold()
    assert 60.0 <= now[0] < 60.5 and len(looks) < 400, "a hundred looks a second were 6000"
    pauses = [after - before for before, after in itertools.pairwise(looks[:-1])]  # the last asks whether to stop
    assert pauses[0] <= 0.02 and all(after > before - 1e-9 for before, after in itertools.pairwise(pauses))


def test_turns_of_trials_end_with_the_deadline_however_long_each_is() -> None:
    now, limits = [0.0], []

    def run(spec: TrialSpec, watch: object) -> TrialOutcome:
        limits.append(spec.limit_s)
        now[0] += 40.0
        return TrialOutcome(number=spec.number, status="ok", step_s=[1.0], elapsed_s=35.0)

    specs = [TrialSpec(number=number, config={}) for number in (0, 1)]
    outcomes = one_after_another(run, specs, rounds=9, deadline_s=200, clock=lambda: now[0])
    assert limits == [200, 160, 120, 80] and [len(outcome.step_s) for outcome in outcomes] == [2, 2]

    def leap(spec: TrialSpec, watch: object) -> TrialOutcome:
        now[0] += 86400.0
        return TrialOutcome(number=spec.number, status="ok", step_s=[1.0], elapsed_s=35.0)

    assert len(one_after_another(leap, specs, rounds=2, deadline_s=200, clock=lambda: now[0])[0].step_s) == 2


def test_one_after_another_where_memory_is_short() -> None:
    order = []

    def run(spec: TrialSpec, watch: object) -> TrialOutcome:
        order.append(spec.number)
        steps = [float(len(order)), float(len(order) + 1)]
        return TrialOutcome(number=spec.number, status="ok", step_s=steps, living_shares=[s / 8.0 for s in steps])

    specs = [TrialSpec(number=number, config={}) for number in (3, 4)]
    outcomes = one_after_another(run, specs, rounds=2, deadline_s=60)
    assert order == [3, 4, 4, 3]
    assert [outcome.step_s for outcome in outcomes] == [[1.5, 4.5], [2.5, 3.5]]
    assert [outcome.living_shares for outcome in outcomes] == [[1.5 / 8, 4.5 / 8], [2.5 / 8, 3.5 / 8]]
    assert outcomes[0].notes == [ALONE]
