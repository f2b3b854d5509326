"""A machine that exists on paper: trials whose seconds and memory follow a formula, on a clock that they move."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.hardware import Machine
from grpo_autotune.predict.objective import Interval
from grpo_autotune.records.search import SearchProgress
from grpo_autotune.records.trial import Progress, PromptReward, TrialOutcome, TrialSpec
from tests.support.sample_records import demo_record, timings, token_facts, trainer_facts

GIB = 2**30
MACHINE = Machine(
    cpu="Paper CPU", cores=4, memory_bytes=16 * GIB, gpus=(), python="3.11", platform="paper", versions={"trl": "1.16"},
    fingerprint="paper",
)  # fmt: skip


def user_config(**search: Any) -> RunConfig:
    """Micro batch 2 of 16, groups of 8, checkpointing on: all that slows this machine."""
    knobs = {
        "grpo.per_device_train_batch_size": [2, 4, 8, 16],
        "grpo.gradient_checkpointing": [True, False],
        "grpo.num_generations": [4, 8],
        "data.image_size": [512, 256],
        "speedups": None,
        "model.attn_implementation": None,
        "grpo.dataloader_num_workers": None,
    }
    return RunConfig.from_dict(
        {
            "model": {"name_or_path": "paper"},
            "data": {"path": "pictures", "image_size": 512, "columns": {"image": "image"}},
            "rewards": [{"name": "r"}],
            "speedups": "none",
            "grpo": {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 8,
                "num_generations": 8,
                "max_steps": 100,
                "gradient_checkpointing": True,
            },
            "search": {"knobs": knobs, **search},
            "output": {"name": "paper"},
        }
    )


def seconds(config: RunConfig) -> float:
    """Of a step: large micro batches, no checkpointing, small images and small groups are faster."""
    step = 0.4 + 1.6 / config.batch.micro_batch
    step *= 1.0 if config.grpo.get("gradient_checkpointing") else 0.8
    step *= {512: 1.0, 256: 0.6}[config.data.image_size or 512]
    return step * (1.0 if config.batch.num_generations == 8 else 0.98)


def peak(config: RunConfig) -> int:
    """Micro batch 16 without checkpointing does not fit."""
    grows = config.batch.micro_batch * (1.0 if not config.grpo.get("gradient_checkpointing") else 0.4)
    return int((2 + grows) * GIB)


class PaperModels:
    """Knows the formula up to a constant error."""

    def __init__(self, error: float = 1.1) -> None:
        self.error, self.seen = error, 0

    def step_s(self, config: RunConfig) -> Interval:
        value = self.error * seconds(config)
        return Interval(value, 0.7 * value, 1.4 * value)

    def stages_s(self, config: RunConfig) -> dict[str, Interval]:
        value = 0.5 * seconds(config)
        return {"generation": Interval(value, value, value)}

    def peak_bytes(self, config: RunConfig, *, worst_case: bool = False) -> Interval:
        return Interval(peak(config), peak(config), peak(config))

    def learn(self, config: RunConfig, outcome: TrialOutcome) -> PaperModels:
        later = PaperModels(self.error)
        later.seen = self.seen + 1
        return later

    def errors(self) -> dict[str, dict[str, float]]:
        return {"step": {"median": self.error - 1, "p90": self.error - 1, "n": self.seen}} if self.seen else {}


class PaperTrials:
    """Runs trials on paper: as the real runner, it leaves spec and outcome in the trial's folder.

    Args:
        run_dir: The run folder.
        noise: Relative standard deviation of a step's seconds.
        rewards: Mean reward by image size.
        drift: Part by which a step gets slower per second of the search.
        lengths: Of the probe's completions, where other trials can be given the same.
        most_bytes: A limit that trials are under and report, if not the machine's memory alone.
        act: Called with each spec before it runs; what it raises, or the outcome it returns, is what happens.
    """

    now = 0.0

    def __init__(
        self,
        run_dir: Path,
        noise: float = 0.01,
        rewards: dict[int, float] | None = None,
        act: Callable[[TrialSpec], TrialOutcome | None] = lambda spec: None,
        startup_s: float = 4.0,
        most_bytes: int | None = None,
        lengths: Sequence[list[int]] = (),
        drift: float = 0.0,
    ) -> None:
        self.run_dir, self.noise, self.act, self.startup_s = run_dir, noise, act, startup_s
        self.most_bytes, self.lengths, self.drift = most_bytes, list(lengths), drift
        self.rewards = rewards or {512: 0.5, 256: 0.5}
        self.random = np.random.default_rng(0)
        self.specs: list[TrialSpec] = []
        self.closed = False
        self.beside = self.most_beside = self.beside_one_alone = 0  # trials of workers that are under way

    def clock(self) -> float:
        return self.now

    def run(self, spec: TrialSpec, watch: Callable[[Progress], None] | None = None) -> TrialOutcome:
        self.beside_one_alone += self.beside
        folder = self._begun(spec, watch)
        outcome = self.act(spec) or self._measured(spec)
        self.now += outcome.elapsed_s
        (folder / "outcome.json").write_text(outcome.model_dump_json())
        return outcome

    def _begun(self, spec: TrialSpec, watch: Callable[[Progress], None] | None) -> Path:
        self.specs.append(spec)
        folder = self.run_dir / "trials" / f"{spec.number:04d}"
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(spec.model_dump_json())
        if watch is not None:
            watch(Progress("generation", 1, spec.steps))
        return folder

    def wait(self, seconds: float) -> None:
        self.now += 0.25

    def worker(self, slower: float) -> PaperWorker:
        """A worker on a part of the machine that takes so many times as long."""
        return PaperWorker(self, slower)

    has_pair = False

    def race(self, specs: Sequence[TrialSpec], *, rounds: int, deadline_s: float) -> list[TrialOutcome]:
        return [self.run(spec.model_copy(update={"steps": rounds, "limit_s": deadline_s})) for spec in specs]

    def close(self) -> None:
        self.closed = True

    def _measured(self, spec: TrialSpec, slower: float = 1.0) -> TrialOutcome:
        config = RunConfig.from_dict(spec.config)
        if peak(config) > min(15 * GIB, self.most_bytes or 15 * GIB):
            return TrialOutcome(
                number=spec.number,
                status="oom",
                why="out of memory",
                most_bytes=self.most_bytes,
                overshoot_bytes=GIB,
                elapsed_s=self.startup_s,
            )
        step_s = seconds(config) * (1.0 + self.drift * self.now) * slower
        count = spec.steps + spec.warmup
        took = self.startup_s * slower + count * step_s * (0.5 if spec.purpose == "rewards" else 1.0)
        if took > spec.limit_s:
            return TrialOutcome(number=spec.number, status="timeout", why="over its limit", elapsed_s=spec.limit_s)
        steps = [step_s * float(np.exp(self.random.normal(0, self.noise))) for _ in range(spec.steps)]
        return TrialOutcome(
            number=spec.number,
            status="ok",
            record=record_of(config, slower),
            step_s=[] if spec.purpose == "rewards" else steps,
            peak_bytes=peak(config),
            idle_bytes=GIB // 2,
            most_bytes=self.most_bytes,
            elapsed_s=took,
            lengths=self.lengths if spec.purpose == "probe" else [],
            rewards=self._rewards(spec, config) if spec.purpose == "rewards" else [],
        )

    def _rewards(self, spec: TrialSpec, config: RunConfig) -> list[PromptReward]:
        prompts = spec.steps * config.batch.prompts_per_generation
        easy = np.random.default_rng(1).uniform(-0.3, 0.3, prompts)
        noise = self.random.normal(0, 0.02, prompts)
        mean = self.rewards[config.data.image_size or 512]
        return [
            PromptReward(prompt=n, rewards=[float(mean + easy[n] + noise[n])] * 8, truncated=0) for n in range(prompts)
        ]


class PaperWorker:
    """Trials beside those of other workers: they end once the clock has moved on."""

    def __init__(self, trials: PaperTrials, slower: float) -> None:
        self.trials, self.slower, self.closed = trials, slower, False
        self.loaded_at: float | None = None

    def prepare(self) -> None:
        self.loaded_at = self.trials.now + self.slower * self.trials.startup_s

    @property
    def is_loading(self) -> bool:
        return self.loaded_at is not None and self.trials.now < self.loaded_at

    def start(
        self, spec: TrialSpec, watch: Callable[[Progress], None] | None = None
    ) -> Generator[None, None, TrialOutcome]:
        folder = self.trials._begun(spec, watch)
        outcome = self.trials.act(spec) or self.trials._measured(spec, self.slower)
        until_s = self.trials.now + outcome.elapsed_s
        self.trials.beside += 1
        self.trials.most_beside = max(self.trials.most_beside, self.trials.beside)
        try:
            while self.trials.now < until_s:
                yield
        finally:
            self.trials.beside -= 1
        (folder / "outcome.json").write_text(outcome.model_dump_json())
        return outcome

    def close(self) -> None:
        self.closed = True


def record_of(config: RunConfig, slower: float = 1.0) -> Any:
    """The probe's record of a configuration."""
    plan, half_s = config.batch, 0.5 * slower * seconds(config)
    rates = [count / 8 for count in (1, 2, 3, 4, 5, 2, 6, 3)] * 4
    return demo_record(
        timings=timings({"generation": half_s, "backward": half_s}),
        tokens=token_facts(groups=len(rates), dead_groups=0, pass_rates=rates),
        trainer=trainer_facts(
            num_generations=plan.num_generations,
            per_device_train_batch_size=plan.micro_batch,
            gradient_accumulation_steps=plan.accumulation,
        ),
    )


class Listener:
    """Keeps what a view is told."""

    def __init__(self) -> None:
        self.states: list[SearchProgress] = []

    def show(self, state: SearchProgress) -> None:
        self.states.append(state)
