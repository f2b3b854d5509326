"""The parent of trials: it gives each to a worker, kills what it started when it must, and classifies every ending."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import cast

from grpo_autotune.config.batch import batch_plan
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.files import write_whole
from grpo_autotune.hardware.out_of_memory import kernel_kills
from grpo_autotune.knobs.ladder import next_rung
from grpo_autotune.records.trial import LOG_FILE, OUTCOME_FILE, SPEC_FILE, TrialOutcome, TrialSpec
from grpo_autotune.trials.endings import ending_of_exit
from grpo_autotune.trials.parent.folder import prepare_folder, read_outcome
from grpo_autotune.trials.parent.interleave import Race, fits_together, one_after_another
from grpo_autotune.trials.parent.recovery import Recovery, used_gpu_bytes
from grpo_autotune.trials.parent.server_pool import ServerPool, is_served
from grpo_autotune.trials.parent.watch import POLL_S, Attempt, AttemptEnd, Watch
from grpo_autotune.trials.parent.worker import Worker
from grpo_autotune.units import duration

Spawn = Callable[[Path, Path, int], Worker]
Trial = Generator[None, None, TrialOutcome]

NOT_BUILT_IN = ("structured_outputs_regex", "group_port", "server_base_url", "server_host", "server_port")
"""Keys of the `vllm` section that a colocated engine is not built from."""

NEW = "new"
"""Key of a worker that has run no trial, which any can use."""

PUSHES = ("merged", "batched")
"""Ways to send weights that ask nothing of the engine."""


class Runner(AbstractContextManager["Runner"]):
    """Runs trials in child processes, one at a time, keeping the newest worker for the next trial that can use it.

    Trials live in `trials/0007` of the run folder. A `warm` runner lets a worker run several; `spawn` starts one for a
    trial's folder, its log, and a number of ranks. The clock tells monotonic seconds, `wait` sleeps for so many between
    two looks, and `used` tells the bytes in use on this machine's GPUs, None where nobody tells."""

    def __init__(
        self,
        run_dir: Path,
        *,
        warm: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
        spawn: Spawn = Worker,
        used: Callable[[], int | None] = used_gpu_bytes,
    ) -> None:
        self._run_dir, self._warm, self._clock, self._wait, self._spawn = run_dir, warm, clock, wait, spawn
        self._used = used
        self._worker: Worker | None = None
        self._spare: Worker | None = None  # the other one of a race, of the same key, for the next race
        self._key: str | None = None
        self._loading: tuple[Path, float] | None = None  # file that is there while a worker loads, and since when
        self._loaded_s = 0.0
        self._server = ServerPool(clock)
        self._recovery = Recovery(used, clock, wait)

    def prepare(self) -> None:
        """Start a worker that loads what every trial needs, before it has one."""
        self._recovery.before_start(others=False)
        handle, name = tempfile.mkstemp(prefix="grpo-autotune-")
        os.close(handle)
        self._loading, self._key = (Path(name), self._clock()), NEW
        self._worker = self._recovery.watch(self._spawn(Path(name), Path(os.devnull), 1))
        self._worker.order(Path(name))

    @property
    def has_pair(self) -> bool:
        """True while both processes of the last race are there for the next."""
        return self._worker is not None and self._spare is not None

    @property
    def is_loading(self) -> bool:
        """True while a worker that was prepared loads."""
        if self._loading is None:
            return False
        path, begun_s = self._loading
        if path.exists() and self._worker is not None and self._worker.poll() is None:
            return True
        path.unlink(missing_ok=True)
        self._loading, self._loaded_s = None, self._clock() - begun_s
        return False

    def run(self, spec: TrialSpec, watch: Watch | None = None) -> TrialOutcome:
        """Run one trial to its end, whatever that is, and return its outcome, which is also in its folder: a failed
        trial has one, too. `watch` is called with its progress whenever that changes. Raises OSError where the run
        folder cannot be written, and what interrupts the wait, such as `KeyboardInterrupt`, once the trial is gone."""
        with closing(self.start(spec, watch)) as trial:
            while True:
                try:
                    next(trial)
                except StopIteration as end:
                    return cast(TrialOutcome, end.value)
                self._wait(POLL_S)

    def start(self, spec: TrialSpec, watch: Watch | None = None) -> Trial:
        """The same for a parent that looks at several runners: it resumes this now and then, until it returns the
        outcome. Closing it ends the trial."""
        folder, kills = prepare_folder(self._run_dir, spec), kernel_kills()
        loaded_s, self._loaded_s = self._loaded_s if spec.purpose == "probe" else 0.0, 0.0  # a start as any other's
        if spec.purpose == "worst_case":  # what it needs of the memory, it needs alone
            self._part_pair()
        if (lost := self._recovery.lost()) is not None:
            return self._written(TrialOutcome(number=spec.number, **lost._asdict()), folder)
        try:
            served = self._served(spec, folder, watch or ignore)
            if isinstance(served, TrialOutcome):
                return served
            spec, server_s = served
            attempt, warm = self._give(spec, folder, watch)
            end = yield from _until_end(attempt)
            if warm and not end.taken_up:  # the worker ended before it took the trial up
                self._retire()
                attempt, _ = self._give(spec, folder, watch)
                end = yield from _until_end(attempt)
            if end.ending is not None:
                self._retire()
            outcome = self._outcome(attempt, end, kills, server_s + loaded_s)
            if outcome.status == "timeout" and server_s:
                outcome = outcome.model_copy(
                    update={"why": f"{outcome.why}; its server took {duration(server_s)} to start"}
                )
            if outcome.status != "ok":
                outcome = self._blamed(outcome, folder)
                self.close()
                if (lost := self._recovery.lost()) is not None:
                    outcome = self._written(outcome.model_copy(update={"why": f"{outcome.why}; {lost.why}"}), folder)
            elif self._key is None or not self._warm:
                self._retire()
        except BaseException:
            self.close()
            raise
        return outcome

    def race(
        self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float, watch: Watch | None = None
    ) -> list[TrialOutcome]:
        """Measure trials, which should see the same prompts, against each other: all alive at once, one running at a
        time, blocks in the order ABBA.

        A block is `steps` optimizer steps of the spec, rounded up to whole cycles of generating and reusing; each trial
        gets at most `rounds`, and a round that would not end within `deadline_s` seconds of the race is not begun.
        Where memory does not hold two of them together, each block is a trial of its own, in the same order, and the
        outcomes' notes say so; more than two that turn out not to fit have no rounds. The outcomes are in the order of
        `specs`; `step_s` holds the mean of each round, and all that went well have as many rounds. Raises as `run`."""
        kills = kernel_kills()
        if fits_together(specs) and self._recovery.lost() is None:
            self._server.end()
            with Race(self._run_dir, specs, self._clock, self._wait, self._start, watch) as race:
                outcomes = [self._outcome(attempt, end, kills) for attempt, end in race.run(rounds, deadline_s)]
                key = worker_key(specs[0])
                if outcomes[0].status == "ok" and self._warm and key is not None:
                    self._worker, self._key = race.release_worker(0), key
                    if outcomes[1].status == "ok" and worker_key(specs[1]) == key and self._used() is None:
                        self._spare = race.release_worker(0)  # on a GPU even an idle process holds memory
            if not race.lacked_memory(outcomes):
                return race.by_round(outcomes)
            if len(specs) > 2:
                return [outcome.model_copy(update={"step_s": [], "living_shares": []}) for outcome in outcomes]
            deadline_s -= race.elapsed_s
        with self._server.held():
            return one_after_another(self.run, specs, rounds, deadline_s, self._clock, watch)

    def close(self) -> None:
        """End worker and server and all they started, and wait until they are gone."""
        self._retire()
        self._server.end()

    def _retire(self) -> None:
        workers, self._worker, self._spare = (self._worker, self._spare), None, None
        for worker in filter(None, workers):
            worker.end()
        if self._loading is not None:
            self._loading[0].unlink(missing_ok=True)

    def _part_pair(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.end()

    def _blamed(self, outcome: TrialOutcome, folder: Path) -> TrialOutcome:
        """A failed trial, with its server's reason where that ended first."""
        ending = self._server.ending()
        if ending is None:
            return outcome
        update = {"status": ending.status, "why": ending.why, "overshoot_bytes": ending.overshoot_bytes}
        return self._written(outcome.model_copy(update=update), folder)

    def _written(self, outcome: TrialOutcome, folder: Path) -> TrialOutcome:
        write_whole(folder / OUTCOME_FILE, outcome.model_dump_json(indent=1))
        return outcome

    def _served(self, spec: TrialSpec, folder: Path, watch: Watch) -> tuple[TrialSpec, float] | TrialOutcome:
        """The trial with its server's address and the seconds of the server's start, or that there is none."""
        if is_served(spec) and self._key != worker_key(spec):
            self._retire()  # an engine in there may hold what the server needs
        served = self._server.ready(spec, folder, watch)
        if isinstance(served, TrialOutcome):
            self._retire()
            self._written(served, folder)
        elif served[0] is not spec:
            write_whole(folder / SPEC_FILE, served[0].model_dump_json(indent=1))
        return served

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _give(self, spec: TrialSpec, folder: Path, watch: Watch | None) -> tuple[Attempt, bool]:
        """Give the trial to the worker there is, or to a new one; True if it is a warm one."""
        before = self._worker, self._spare
        self._worker = self._start(spec, folder)
        self._key = worker_key(spec)
        return Attempt(self._worker, spec, folder, self._clock, watch or ignore), self._worker in before

    def _start(self, spec: TrialSpec, folder: Path) -> Worker:
        """A worker that has the order to run the trial: the one there is, which then is ours no more, or a new one."""
        key = worker_key(spec)
        for worker in filter(None, (self._worker, self._spare)):
            self._worker, self._spare = None, self._spare if worker is self._worker else None
            if key is not None and self._key in (key, NEW) and worker.order(folder):
                return worker
            worker.end()
        self._recovery.before_start(others=self._server.alive)
        worker = self._recovery.watch(self._spawn(folder, folder / LOG_FILE, spec.world_size))
        worker.order(folder)
        return worker

    def _outcome(self, attempt: Attempt, end: AttemptEnd, kills: int, server_s: float = 0.0) -> TrialOutcome:
        log = attempt.folder / LOG_FILE
        ending = end.ending if end.code is None else ending_of_exit(end.code, kernel_kills() > kills, log)
        written = read_outcome(attempt.folder, attempt.spec, ending)
        started_s = None if attempt.startup_s is None else attempt.startup_s + server_s
        elapsed_s, warm = attempt.elapsed_s + server_s, written.warm and not server_s
        update = {"elapsed_s": elapsed_s, "startup_s": started_s, "warm": warm, "rung": _rung(attempt.spec, written)}
        return self._written(written.model_copy(update=update), attempt.folder)


def _until_end(attempt: Attempt) -> Generator[None, None, AttemptEnd]:
    while (end := attempt.look()) is None:
        yield
    return end


def _rung(spec: TrialSpec, outcome: TrialOutcome) -> str | None:
    """The first rung that a training with `on_oom: ladder` would go down, where a trial ran out of memory."""
    if outcome.status != "oom" or spec.script is not None or spec.world_size > 1:
        return None
    config = RunConfig.from_dict({**spec.config, "on_oom_allow": []})
    knobs = next_rung(config, None) or {}
    return ", ".join(f"{key} {value}" for key, value in knobs.items()) or None


def ignore(progress: object) -> None:
    """A watch that does nothing."""


def worker_key(spec: TrialSpec) -> str | None:
    """Trials of one key can share a worker; None where a trial needs one for itself. Without an engine in the process a
    worker keeps imports and data, and the model is loaded anew. An engine stays, so what it is built from must be equal
    (trl/generation/vllm_generation.py, `_init_vllm`); a trial whose engine turns out to be another one after all is
    given to a new worker (`trials.child.warm_state`)."""
    if spec.script is not None or spec.world_size > 1:
        return None
    model, grpo = dict(spec.config.get("model", {})), spec.config.get("grpo", {})
    section = dict(spec.config.get("vllm") or {})
    source = {name: model.get(name) for name in ("name_or_path", "random_init", "revision")}
    if is_served(spec) and section["server_gpus"] and section.get("weight_sync") != "adapter":
        return None  # TRL pushes weights from a port that it keeps while the process lives
    if not grpo.get("use_vllm") or section.get("mode") == "server" or section.get("server_gpus") is not None:
        return json.dumps([source, section.get("server_gpus")])  # it decides which GPUs the process sees
    built = {name: value for name, value in section.items() if name not in NOT_BUILT_IN}
    if built.get("weight_sync") in PUSHES:
        built["weight_sync"] = PUSHES[0]
    if "max_num_seqs" not in built:
        plan = batch_plan(grpo)
        built["max_num_seqs"] = plan.micro_batch * plan.steps_per_generation * section.get("tensor_parallel_size", 1)
    typed = {name: grpo.get(name) for name in ("bf16", "fp16")}
    return json.dumps([model, typed, built], sort_keys=True, default=str)
