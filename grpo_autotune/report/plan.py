"""A plan: seconds, memory and passes of a whole run, from one measured configuration and the models that predict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from statistics import median
from typing import Literal

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.estimate.adapters import adapter_sizes
from grpo_autotune.estimate.architectures import ARCHITECTURES
from grpo_autotune.estimate.shapes import ModelShape
from grpo_autotune.knobs import PROMPTS, Knobs, context_of, knob, knobs_of, with_knobs
from grpo_autotune.knobs.apply import GROUP, MICRO, why_not
from grpo_autotune.knobs.table import grpo_value
from grpo_autotune.knobs.values import divisors
from grpo_autotune.predict.models import CONFIDENCE, Models
from grpo_autotune.predict.objective import Interval, evaluation_every, groups_per_step, save_every
from grpo_autotune.predict.room import fits
from grpo_autotune.predict.workload import tokens_at, workload
from grpo_autotune.records.plan import Choice, Figure, Occasion, Pass, Plan
from grpo_autotune.records.probe import ProbeRecord, cycle_means
from grpo_autotune.report.compare import half_width

IMAGE_SIZE, RANK, SIDES, GROUPS, CADENCES = (
    "data.image_size",
    "peft.r",
    (384, 512, 768, 1024),
    (2, 4, 8, 16, 32),
    (1, 2, 5, -1),
)
RANKS, BUDGETS_GB = (4, 8, 16, 32, 64, 128, 256), (24.0, 40.0, 80.0, 141.0)
MOST_REACH = math.log(10.0)
"""Of an interval to either side, as a logarithm: one step alone tells no scatter."""
OTHER_MODEL = math.log(2.0)
"""Reach that another model adds: its layers run at other shares of the machine's ceilings."""
CHEAPER = {"grpo.gradient_checkpointing": True, MICRO: 1, IMAGE_SIZE: 384, "model.load_in_4bit": True}
"""Changes that take less memory, in the order in which they are tried."""
CHECKPOINT_S, CHECKPOINT_REACH = 12 / 5e8, math.log(5.0)
"""Of a trained weight, it and two moments, at the rate of a disk, which is assumed."""


@dataclass(frozen=True)
class Basis:
    """The input of a plan. A sample is a prompt with its completions."""

    config: RunConfig  # the configuration that was measured
    record: ProbeRecord  # its probe, evaluations and checkpoints left out
    models: Models  # that know the probe, and trials where a search had them
    source: str  # name of the run
    once_s: Mapping[str, float] = field(default_factory=dict)  # seconds of one `evaluate` and `save`, where measured
    samples: int = 0  # prompts of the run that is planned; 0 for the configuration's own length
    memory_bytes: int | None = None  # that it has to fit into; None where nobody tells

    @cached_property
    def measured(self) -> tuple[float, float]:
        """Seconds of a step, and the reach of what is measured: by the scatter of steps and the pace of the machine."""
        t = self.record.timings
        cycles = cycle_means(t.step_s, t.cycle)
        return median(cycles), min(MOST_REACH, half_width(self.record, "step", cycles, CONFIDENCE))

    def own_samples(self) -> int:
        """Samples of the run as it is configured. Raises `ConfigError` where nobody knows the length of the data."""
        steps, rows = int(grpo_value("max_steps", self.config)), self.record.trainer.train_rows
        if steps > 0:
            return max(1, round(steps * groups_per_step(self.config)))
        if rows is None:
            what = "the probe does not tell how many rows a pass over the data has"
            raise ConfigError(what, where=self.source, fix="Give --samples N.")
        return max(1, round(rows * float(grpo_value("num_train_epochs", self.config))))

    def steps(self, config: RunConfig) -> int:
        """Optimizer steps for the samples."""
        return max(1, math.ceil(self.samples / groups_per_step(config) - 1e-9))

    def step(self, config: RunConfig, other: Models | None = None) -> Figure:
        """Seconds of a step of a configuration, or of another model under it."""
        if config == self.config and other is None:
            return around(*self.measured, "measured")
        return self._predicted((other or self.models).step_s(config), other)

    def _predicted(self, seconds: Interval, other: Models | None) -> Figure:
        """A prediction with its own doubt, and that of what it was predicted from."""
        doubt = math.log(seconds.high / seconds.value) if seconds.value > 0.0 else 0.0
        return around(seconds.value, math.hypot(doubt, self.measured[1], OTHER_MODEL if other else 0.0))

    def _once(self, name: str, config: RunConfig, other: Models | None) -> Figure | None:
        """Seconds of one `evaluate` or `save`; None for an evaluation of nobody knows how many rows."""
        known, rows = self.once_s.get(name), self.record.trainer.held_out_rows or config.data.max_eval_samples
        models = other or self.models
        if known is not None and other is None and (config == self.config or name == "save"):
            return around(known, self.measured[1], "measured")
        if name == "save":
            return around(CHECKPOINT_S * models.record.trainer.trainable_parameters, CHECKPOINT_REACH)
        if rows is None or config.batch.eval_batch is None:
            return None
        guess = self._predicted(models.evaluation_s(config, rows), other)
        return guess.times(known / self.models.evaluation_s(self.config, rows).value if known else 1.0)

    def run(self, config: RunConfig, eval_steps: int = 0, other: Models | None = None) -> tuple[Figure, list[Occasion]]:
        """Seconds of the whole run (start, steps, evaluations, checkpoints), and its occasions; `eval_steps` replaces
        the configured distance, below zero for no evaluation."""
        steps, seen = self.steps(config), list[tuple[str, int, int, Figure]]()
        for name, every in (("evaluate", eval_steps or evaluation_every(config)), ("save", save_every(config))):
            if every and (once := self._once(name, config, other)) is not None:
                more = name == "evaluate" and bool(config.grpo.get("eval_on_start"))
                seen.append((name, every, steps // every + more if every > 0 else 0, once))
        start = around(math.fsum(phase.seconds for phase in self.record.startup), self.measured[1])
        parts = [start, self.step(config, other).times(steps), *(once.times(n) for *_, n, once in seen)]
        # errors are one machine's pace, so that ends add up
        value, low, high = (math.fsum(float(part[end]) for part in parts) for end in range(3))
        whole = Figure(value, low, high)
        return whole, [
            Occasion(name=name, every=n, times=often, once_s=s, share=often * s.value / whole.value, total_s=whole)
            for name, n, often, s in seen
        ]

    def choice(self, name: str, knobs: Knobs, other: Models | None = None) -> Choice:
        """A row of a table. Raises `ConfigError` where the knobs do not fit together."""
        config, images, side = with_knobs(self.config, knobs), self.record.images, knobs.get(IMAGE_SIZE)
        now = images.tokens.mean if images and images.tokens else None
        sample, models = self.step(config, other).times(1.0 / groups_per_step(config)), other or self.models
        fit = fits(models, config, self.memory_bytes)
        return Choice(
            name=name,
            knobs=knobs,
            image_tokens=now if side is None else tokens_at(side, self.record, self.config, {}),
            sample_s=sample,
            total_s=self.run(config, other=other)[0],
            speed=self.measured[0] / groups_per_step(self.config) / sample.value,
            peak_bytes=Figure(*models.peak_bytes(config, worst_case=True)[:3]),
            fits=fit,
            remedy=None if fit else self._remedy(models),
        )

    def _remedy(self, models: Models) -> str | None:
        for key, value in CHEAPER.items():
            legal = why_not(self.config, {key: value}, models.machine, models.record) is None
            if legal and fits(models, with_knobs(self.config, {key: value}), self.memory_bytes):
                return f"{key} {str(value).lower()}"
        return None

    def image_sizes(self) -> Iterator[Choice]:
        """The size now, and listed ones that may differ from it; smaller ones where it is below all of them."""
        now, images = self.config.data.image_size, self.record.images
        if images is None or images.tokens is None:
            return
        side = now or math.sqrt(images.pixels.p50)
        yield self.choice(f"{side:.0f} px (now)", {})
        near = knob(IMAGE_SIZE).values(context_of(self.config, self.models.machine, self.record))
        for size in [s for s in SIDES if s < side or (now and s > side)] or sorted(s for s in near if s and s < side):
            yield self.choice(f"{size} px", {IMAGE_SIZE: size})

    def group_sizes(self) -> Iterator[Choice]:
        """The size now, and usual ones: at the step's completions where they are whole groups, else at its prompts."""
        size_now = self.config.batch.num_generations
        yield self.choice(f"{size_now} (now)", {})
        for size in (size for size in GROUPS if size != size_now):
            for knobs in ({GROUP: size}, {GROUP: size, **knobs_of(self.config, [PROMPTS])}):
                try:
                    yield self.choice(str(size), knobs)
                    break
                except ConfigError:
                    continue

    def other_models(self) -> Iterator[Choice]:
        """Every listed model in place of the measured one, at this machine's rates; text models where no image is."""
        for name, row in ARCHITECTURES.items():
            shape, trainer = ModelShape.from_config(row.config), self.record.trainer
            if shape.vision is not None or self.record.images is None:
                sizes = adapter_sizes(shape, trainer.peft) if trainer.peft else None
                trained = sizes.text + sizes.blocks + sizes.mergers if sizes else shape.parameters
                update = {"model_config_json": dict(row.config), "trainable_parameters": trained}
                record = self.record.model_copy(update={"trainer": trainer.model_copy(update=update)})
                yield self.choice(name, {}, replace(self.models, record=record))

    def budget(self, memory_bytes: float) -> dict[str, int | None]:
        """The largest values of three knobs that fit into so much memory, each with the others as they are."""
        config, record, plan = self.config, self.record, self.config.batch
        if record.trainer.device_bytes is not None:  # an engine takes its share of this card
            trainer = record.trainer.model_copy(update={"device_bytes": round(memory_bytes)})
            record = record.model_copy(update={"trainer": trainer})
        models = replace(self.models, record=record)

        def largest(key: str, values: Sequence[int]) -> int | None:
            legal = [v for v in values if why_not(config, {key: v}, models.machine, record) is None]
            fitting = (v for v in legal if fits(models, with_knobs(config, {key: v}), round(memory_bytes)))
            return max(fitting, default=None)

        return {
            MICRO: largest(MICRO, divisors(plan.micro_batch * plan.accumulation)),
            RANK: largest(RANK, RANKS if config.peft else ()),
            IMAGE_SIZE: largest(IMAGE_SIZE, SIDES if record.images is not None else ()),
        }

    def passes(self) -> Iterator[Pass]:
        """Passes of one sample through the model, counted from the configuration and the measured lengths."""
        tokens, group, machine = self.record.tokens, self.config.batch.num_generations, self.models.machine
        assert tokens is not None
        asked = (self.config, self.config.model_copy(update={"speedups": "auto"}))
        load, most = (workload(config, self.config, self.record, machine) for config in asked)
        facts, on = load.facts, "shared_prefix" in load.speedups
        in_pass, backward = min(group, facts.micro_batch * most.merged), 3 if facts.training.checkpointing else 2
        for name, often, copies, shares in (
            ("generation", 1, group, facts.use_vllm or "shared_prefill" in load.speedups),
            ("old policy", int(facts.old_policy), group, on),
            ("reference", int(facts.reference), group, on),
            ("training, forward", facts.iterations, in_pass, on),
            ("training, backward", facts.iterations * backward, in_pass, on),
        ):
            rows, prompt, answer = often * group, tokens.prompt.mean, tokens.completion.mean
            if rows:
                yield Pass(name, rows, rows * (prompt + answer), rows * (prompt / copies + answer), shares)


def around(value: float, reach: float, how: Literal["measured", "predicted"] = "predicted") -> Figure:
    """A figure whose ends lie `reach` to either side, as a logarithm."""
    return Figure(value, value * math.exp(-reach), value * math.exp(reach), how)


def plan_of(basis: Basis, now: datetime, memory_gb: float | None = None) -> Plan:
    """Plan a run that begins now, for a memory in 1e9 bytes beside the usual ones. Raises `ConfigError` where nothing
    tells its length."""
    basis = replace(basis, samples=basis.samples or basis.own_samples())
    config, tokens, step = basis.config, basis.record.tokens, basis.step(basis.config)
    assert tokens is not None
    whole, occasions = basis.run(config)
    every = next((row.every for row in occasions if row.name == "evaluate"), 0)
    unknown = "Evaluation is not counted: the probe does not tell its rows. Probe again, or give --with-eval."
    return Plan(
        confidence=CONFIDENCE,
        source=basis.source,
        notes=[unknown] if not every and config.batch.eval_batch is not None else [],
        samples=basis.samples,
        steps=basis.steps(config),
        step_s=step,
        sample_s=step.times(1.0 / groups_per_step(config)),
        total_s=whole,
        ends=[(now + timedelta(seconds=s)).isoformat(" ", "minutes") for s in (whole.low, whole.value, whole.high)],
        occasions=occasions,
        cadences=[basis.run(config, n * every)[1][0] for n in CADENCES] if every else [],
        tables={
            "image size": list(basis.image_sizes()),
            "num_generations": list(basis.group_sizes()),
            "model": list(basis.other_models()),
        },
        budgets={
            f"{gb:g} GB": basis.budget(1e9 * gb) for gb in sorted({*BUDGETS_GB, *([memory_gb] if memory_gb else [])})
        },
        passes=list(basis.passes()),
        supervised_tokens=(4 if basis.record.trainer.gradient_checkpointing else 3)
        * (tokens.prompt.mean + tokens.completion.mean),
    )
