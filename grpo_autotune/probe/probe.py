"""The probe of one trainer: layers on TRL's seams, a tree of spans for each optimizer step, and facts of the run.

It draws no random numbers and changes no value, so training logs the same losses with and without it.
"""

import itertools
import json
import math
import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grpo_autotune.console import HEARTBEAT_S, as_warning, warn
from grpo_autotune.hardware.device import room_of, runtime_facts
from grpo_autotune.hardware.device_memory import DEVICE_MEMORY
from grpo_autotune.hardware.versions import tell_untried
from grpo_autotune.probe.collectives import Collectives
from grpo_autotune.probe.exchange import collect, publish
from grpo_autotune.probe.facts import KEEP, ImageCollector, RewardCollector, TokenCollector, forget
from grpo_autotune.probe.gauges import gauges_for, ranges_for
from grpo_autotune.probe.kernels import PASSES, KernelProfile, kernels_by_stage
from grpo_autotune.probe.layers import install
from grpo_autotune.probe.live import LIVE_STEPS, LiveFile
from grpo_autotune.probe.sampler import Sampler, readers_for
from grpo_autotune.probe.signal import SignalWatch
from grpo_autotune.probe.spans import Span, SpanRecorder, StepSpans
from grpo_autotune.probe.stages import APART, FIRST_USE, StepStages, stages_of, summarise
from grpo_autotune.probe.startup import Startup, hint
from grpo_autotune.probe.trainer_facts import cycle_of, facts_of, speedup_counts, trained_rows, versions
from grpo_autotune.records.probe import DeviceMemory, ProbeRecord, ProfiledStep, RankTimings, StageTimings
from grpo_autotune.records.rollout import EngineFacts
from grpo_autotune.rollout.fidelity.meter import FidelityMeter
from grpo_autotune.rollout.fidelity.training_log import meter_of
from grpo_autotune.rollout.metrics.server import meter_for
from grpo_autotune.seams.first_use import watch_first_use
from grpo_autotune.seams.layers import AttributeSlot, Next, take_off, wrap
from grpo_autotune.seams.sharding import sharding_fact
from grpo_autotune.seams.table import CALLBACKS, TABLE
from grpo_autotune.seams.trainer_access import base_of, end_tokens, image_tokens
from grpo_autotune.units import duration

SPANS_FILE = "spans.jsonl"
MOST_SPANS_BYTES = 8 * 2**20
"""Size at which the file of spans ends: hundreds of steps, more than anybody looks at one by one."""
_NUMBERS = itertools.count()


class Probe:
    """Measures `trainer` from now until `detach`; SeamError where the installed TRL lacks the method that ends a step.

    Not measured are the first `warmup` steps, by default one cycle of generating and reusing, and one more with a
    `profile`: on a GPU, of the kernels of the first step of the last cycle that is not measured, where that is not the
    first cycle of all."""

    def __init__(
        self,
        trainer: Any,  # a `trl.GRPOTrainer`; no other trainer of TRL has these seams
        *,
        startup: Startup | None = None,  # measured before; else the time since the process's birth is one phase
        out_dir: Path | None = None,  # gets `spans.jsonl`, a line per step (ranks other than 0 add their number)
        warmup: int | None = None,
        profile: bool = False,
        say: Callable[[str], None] = lambda sentence: None,  # told that steps have no learning signal
        live: LiveFile | None = None,
    ) -> None:
        self.trainer = trainer
        self.live = live
        self.startup = startup or Startup()
        if startup is None:
            self.startup.since_birth("before_attach")
        self.cycle = cycle_of(trainer.args)
        timer, self._gauge = gauges_for(trainer.args.device)
        self.profiles = profile and timer is not None
        self.warmup = self.cycle * (1 + self.profiles) if warmup is None else warmup
        self.recorder = SpanRecorder(timer=timer, memory=self._gauge, ranges=ranges_for(trainer.args.device))
        self.collectives = Collectives(self.recorder, trainer)
        self.tokens, self.images = TokenCollector(), ImageCollector()
        self.rewards = RewardCollector()
        self.remote = {n: one.remote for n, one in enumerate(trainer.reward_funcs) if hasattr(one, "remote")}
        self.signal = SignalWatch(trainer, self.cycle, say)
        watching = meter_of(trainer)
        self.watched, self.fidelity = watching is not None, watching or FidelityMeter(trainer)
        self.fidelity.around = lambda: self.recorder.span("", "probe")
        self.closed = 0
        self._room = room_of(trainer.args.device)
        self._kernels: KernelProfile | None = None
        self._profiled: ProfiledStep | None = None
        self.engine = meter_for(
            getattr(trainer, "vllm_generation", None),
            step=lambda: self.closed,
            counting=lambda: self.counting() and not self.fidelity.asking,
        )
        self._blind = False
        self.rollout: tuple[list[list[int]], list[list[int]]] = [], []
        self.weight_sync_bytes: int | None = None
        self._last_step, self._earlier = trainer.state.global_step, 0
        self._steps: deque[StepStages] = deque(maxlen=KEEP)
        self._living, self._rows = deque[float](maxlen=KEEP), trained_rows(trainer)
        self._pending: list[StepSpans] = []
        self._ended = False
        self._topic = f"grpo-autotune/probe-{next(_NUMBERS)}"
        self._file = self._open_spans(out_dir) if out_dir is not None else None
        alive = weakref.ref(self)
        self._sampler = Sampler(
            lambda: None if (probe := alive()) is None else probe._stage_now(),
            readers_for(trainer.args.device, self._gauge),
            ranks=int(os.environ.get("LOCAL_WORLD_SIZE", trainer.accelerator.num_processes)),
            keep=lambda values: None if (probe := alive()) is None else probe._see_machine(values),
        )
        tell_untried()
        self._handles = [*install(self), wrap(AttributeSlot(trainer, "train"), self._around_train)]
        shared = [handle.remove for handle in self._handles if handle.shared]
        self._unwatch = watch_first_use(partial(self.recorder.span, "", FIRST_USE))
        for leave in (self._sampler.stop, self.recorder.abandon, self._unwatch, *shared):
            weakref.finalize(self, leave)  # a probe may be forgotten with its trainer, without being detached
        self._callback = _Edges(self)
        trainer.add_callback(self._callback)

    def detach(self) -> None:
        """Remove every layer, so that the trainer is as it was; measurements stay readable."""
        take_off(self._handles)
        self._unwatch()
        self.fidelity.around = nullcontext
        self.trainer.remove_callback(self._callback)
        self._stop()
        if self._gauge is not None:
            self.recorder.memory = None
            self._gauge.close()
            self._gauge = None

    def counting(self) -> bool:
        """Return whether a training step is under way, outside evaluation."""
        return self.recorder.is_open and not self.recorder.inside(APART)

    def now(self) -> str | None:
        """The step and stage under way, in words for a heartbeat; None while the step is younger than a heartbeat."""
        span, age_s = self.recorder.current(), self.recorder.age_s()
        if span is None:
            return self.startup.now()
        if age_s < HEARTBEAT_S:
            return None
        state, stage = self.trainer.state, self._stage_now()
        counted = stage == APART  # by then the trainer has counted the step
        step = f"step {state.global_step + (0 if counted else 1)} of {state.max_steps}"
        return f"{step}: {stage}{'' if self.closed else hint(stage, age_s)}, {duration(age_s)} since the step began"

    def locate(self) -> tuple[int, object, str] | None:
        """Steps measured, a mark that every edge of a span changes, and the stage, for any thread; None without."""
        stage = self._stage_now()
        return None if stage is None else (self.closed, (self.closed, *self.recorder.mark()), stage)

    def see_generation(self, inputs: Any, output: dict[str, Any]) -> None:
        if self._blind:
            return
        trainer, self._blind = self.trainer, True
        with as_warning("completions are not looked at from here on"):
            if self.rollout[0]:  # empty where its seam is gone
                self.tokens.see_output(self.closed, *self.rollout, output, end_tokens(trainer))
            merge = getattr(getattr(trainer.processing_class, "image_processor", None), "merge_size", 1)
            self.images.see(self.closed, inputs, output, int(merge))
            if not self.watched:
                self.fidelity.see(output)
            self._blind = False

    def train_began(self) -> None:
        """Open the first step's tree; steps of a second training are numbered on from those of the first."""
        step = self.trainer.state.global_step
        self._earlier = max(0, self._earlier + self._last_step - step) if self.closed else 0
        self._open(step)

    def step_ended(self, grad_norm: Any = None) -> None:
        """Close the tree if an optimizer step, whose gradient had this norm, is complete, and open the next one's."""
        step = self.trainer.state.global_step
        if self.recorder.is_open:
            if step <= self._last_step:
                return
            spans = self.recorder.close_root(step + self._earlier)
            if self._kernels is not None:
                self._profiled, self._kernels = self._profile_of(spans, self._kernels), None
            trainer = self.trainer
            why = self.tokens.without_signal(trainer.num_generations, trainer.reward_weights.tolist())
            self.signal.see(grad_norm, spans.spans[0].host_s, **why)
            self._keep(spans)
        self._open(step)

    def train_ended(self) -> None:
        """Stop sampling and publish this rank's means to the others."""
        self._stop()
        publish(self._means(self._timings()), self._topic)
        self._ended = True

    def record(self) -> ProbeRecord:
        """Everything measured so far; can be called at any time, also after `detach`."""
        timings = self._timings()
        first = self.closed - len(timings.steps)
        facts, steps, engine = facts_of(self.trainer, self._room), len(timings.steps), self._engine_facts(first)
        return ProbeRecord(
            timings=timings,
            trainer=facts,
            tokens=self.tokens.facts(first, steps, self.cycle, facts),
            images=self.images.facts(first, steps, self.cycle, partial(image_tokens, self.trainer.processing_class)),
            resample=getattr(getattr(self.trainer, "resampling", None), "facts", None),
            rewards=self.rewards.facts(),
            remote=[one.calls().model_copy(update={"place": place}) for place, one in self.remote.items()],
            utilisation=self._sampler.summary(),
            others=self._sampler.others(on_gpu=self.recorder.timer is not None),
            profiled=self._profiled,
            zero_gradients=sum(list(self.signal.zero)[-steps:]) if steps else 0,
            zero_unexplained=sum(list(self.signal.unexplained)[-steps:]) if steps else 0,
            speedups=speedup_counts(self.trainer),
            living_shares=self._living_shares(steps),
            startup=self.startup.phases(),
            fidelity=self.fidelity.facts(),
            engine=engine,
            weight_sync_bytes=self.weight_sync_bytes if engine is None else engine.sync_bytes,
            rank=self.trainer.accelerator.process_index,
            ranks=self._ranks(timings),
            device_memory=DeviceMemory(**DEVICE_MEMORY.facts()) if self.recorder.timer is not None else None,
            versions=versions(),
            runtime=runtime_facts(self.trainer.args.device) | sharding_fact(self.trainer),
        )

    def _around_train(self, call_next: Next, /, *args: Any, **kwargs: Any) -> Any:
        """A layer on `train`, which may end without a word to its callbacks."""
        try:
            return call_next(*args, **kwargs)
        finally:
            self._stop()

    def _stop(self) -> None:
        self.recorder.abandon()
        forget(self.closed, self.tokens, self.images)
        kernels, self._kernels = self._kernels, None  # of a step that did not end
        if kernels is not None:
            with suppress(RuntimeError):  # the device may be why
                kernels.stop()
        self._sampler.stop()
        self._see_machine(None)

    def _see_machine(self, values: dict[str, float] | None) -> None:
        if values is not None:
            self.recorder.note(values)
        if self.live is not None:
            seconds = [step.wall_s for step in list(self._steps)[-LIVE_STEPS:]]
            self.live.see(self.trainer.state, self._stage_now(), seconds, values)

    def _living_shares(self, steps: int) -> list[float]:
        shares = list(self._living)[-steps:] if steps else []
        return [] if any(map(math.isnan, shares)) else shares

    def _engine_facts(self, first: int) -> EngineFacts | None:
        """The meter's facts; with TRL's plain engine, its start and the bytes of a sync come from the probe."""
        facts = self.engine.facts(first)
        if facts is None:
            return None
        started = next((phase.seconds for phase in self.startup.phases() if phase.name == "engine"), None)
        plain = {"start_s": started, "sync_bytes": self.weight_sync_bytes}
        return facts.model_copy(update={key: value for key, value in plain.items() if getattr(facts, key) is None})

    def _open(self, step: int) -> None:
        self._last_step, self._rows = step, trained_rows(self.trainer)
        for remote in self.remote.values() if self.closed == self.warmup else ():
            remote.reset()
        self._sampler.start()
        if self.profiles and 0 < self.closed == self.warmup - self.cycle:
            try:
                self._kernels = KernelProfile(base_of(self.trainer.model), lambda: self.recorder.inside("generation"))
            except RuntimeError:  # somebody else's profiler is at work
                self.profiles = False
        self.recorder.open_root()

    def _profile_of(self, spans: StepSpans, kernels: KernelProfile) -> ProfiledStep:
        entries = kernels.stop()
        whole = stages_of(spans, self.recorder.timer, whole=True)
        stages = kernels_by_stage(spans, entries, whole.self_s, kernels.paused)
        tokens = sum(max(one.completion, default=0) for one in self.tokens.generations if one.step == self.closed)
        return ProfiledStep(
            step=spans.step,
            micro_batches=self.trainer.args.gradient_accumulation_steps,
            tokens=(min(tokens, PASSES) if kernels.paused else tokens) or None,
            stages=stages,
        )

    def _means(self, timings: StageTimings) -> RankTimings:
        return RankTimings(
            rank=self.trainer.accelerator.process_index,
            step_s=_mean(timings.step_s),
            stages={row.name: _mean(row.per_step_s) for row in timings.stages},
        )

    def _ranks(self, timings: StageTimings) -> list[RankTimings]:
        """All ranks once training has ended (to the first rank, the only one that reports them), else this one."""
        mine, others = self._means(timings), self.trainer.accelerator.num_processes
        if not (self._ended and others > 1 and mine.rank == 0):
            return [mine]
        return collect(self._topic, others) or [mine]

    def _keep(self, spans: StepSpans) -> None:
        if not self.closed:
            self.startup.first_step(stages_of(spans, whole=True).self_s)
        self.closed += 1
        rows, skipped = (now - then for now, then in zip(trained_rows(self.trainer), self._rows, strict=True))
        self._living.append(1.0 - skipped / rows if rows > 0.0 else math.nan)
        self._pending.append(spans)
        timer = self.recorder.timer
        while self._pending and (timer is None or timer.done(self._pending[0].spans[0].end_mark)):
            self._settle(self._pending.pop(0))

    def _settle(self, spans: StepSpans) -> None:
        self._steps.append(stages_of(spans, self.recorder.timer))
        if self._file is not None:
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(spans.line()) + "\n")
                    full = file.tell() >= MOST_SPANS_BYTES
                self._file = None if full else self._file
            except OSError as error:
                warn(f"{self._file} ends before step {spans.step}: {error.strerror}")
                self._file = None

    def _timings(self) -> StageTimings:
        timer = self.recorder.timer
        while self._pending:
            if timer is not None:
                timer.wait(self._pending[0].spans[0].end_mark)
            self._settle(self._pending.pop(0))
        dropped = self.closed - len(self._steps)
        return summarise(
            list(self._steps),
            warmup=max(0, self.warmup - dropped),
            cycle=self.cycle,
            on_device=timer is not None,
            seams=_seam_names(),
        )

    def _stage_now(self) -> str | None:
        if self.recorder.inside(APART):
            return APART
        span = self.recorder.current()
        return None if span is None else span.stage or "other"

    def _open_spans(self, folder: Path) -> Path:
        rank = self.trainer.accelerator.process_index
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("spans.rank*.jsonl") if rank == 0 else ():
            number = stale.stem.removeprefix("spans.rank")
            if number.isdecimal() and int(number) >= self.trainer.accelerator.num_processes:
                stale.unlink()  # of an earlier run with more ranks
        path = folder.absolute() / (SPANS_FILE if rank == 0 else f"spans.rank{rank}.jsonl")
        path.write_bytes(b"")
        return path


class _Edges(TrainerCallback):  # type: ignore[misc]
    """The edges of a step that no method of the trainer marks."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._optimizer: Span | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe.train_began()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe.train_ended()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._probe.recorder.is_open:
            self._optimizer = self._probe.recorder.begin("optimizer", "step")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer is not None:
            self._probe.recorder.end(self._optimizer)
            self._optimizer = None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _seam_names() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    rows = [(row.stage, f"{row.owner}.{row.attribute}") for row in TABLE if row.stage]
    for stage, name in (*rows, *CALLBACKS.items()):
        names.setdefault(stage, []).append(name)
    names["reference_logprob"] = ["trainer._get_per_token_logps_and_entropies"]
    names["reward"].append("trainer.reward_funcs[i]")
    return names
