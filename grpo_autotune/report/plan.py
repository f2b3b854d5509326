"""A plan: seconds, memory and passes of a whole run, from one measured configuration and the models that predict."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
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
from grpo_autotune.knobs.sharding import STAGE, ZERO_KNOBS
from grpo_autotune.knobs.values import divisors
from grpo_autotune.predict.models import CONFIDENCE, Models
from grpo_autotune.predict.objective import groups_per_step, occasions_of, run_steps, steps_between
from grpo_autotune.predict.room import fits
from grpo_autotune.predict.workload import tokens_at, workload
from grpo_autotune.records.plan import Choice, Figure, Occasion, Pass, Plan
from grpo_autotune.records.probe import cycle_means
from grpo_autotune.report.compare import half_width

IMAGE_SIZE, RANK, SIDES, GROUPS = "data.image_size", "peft.r", (384, 512, 768, 1024), (2, 4, 8, 16, 32)
CADENCES = (1, 2, 5, 0)
RANKS, BUDGETS_GB = (4, 8, 16, 32, 64, 128, 256), (24.0, 40.0, 80.0, 141.0)
MOST_REACH, OTHER_MODEL = math.log(10.0), math.log(2.0)
"""Of an interval to either side, as a logarithm: one step alone tells no scatter; and what another model adds, whose
layers run at other shares of the machine's ceilings."""
CHEAPER = {"grpo.gradient_checkpointing": True, STAGE: 3, MICRO: 1, IMAGE_SIZE: 384, "model.load_in_4bit": True}
"""Changes that take less memory, in the order in which they are tried."""
CHECKPOINT_S, CHECKPOINT_REACH = 12 / 5e8, math.log(5.0)
"""Of a trained weight, it and two moments, at the rate of a disk, which is assumed."""
LATEST_S = 1e11
"""Seconds from now until the last date that is told: 3 000 years."""


@dataclass(frozen=True)
class Basis:
    """The input of a plan. A sample is a prompt with its completions."""

    models: Models  # of the measured configuration by its probe, evaluations and checkpoints left out, and a search's
    source: str  # name of the run
    once_s: Mapping[str, float] = field(default_factory=dict)  # seconds of one `evaluate` and `save`, where measured
    samples: float = 0.0  # prompts of the run that is planned; 0 for the configuration's own length
    memory_bytes: int | None = None  # that it has to fit into; None where nobody tells

    @cached_property
    def measured(self) -> tuple[float, float]:
        """Seconds of a step, and the reach of what is measured: by the scatter of steps and the pace of the machine."""
        timings = self.models.record.timings
        cycles = cycle_means(timings.step_s, timings.cycle)
        return median(cycles), min(MOST_REACH, half_width(self.models.record, "step", cycles, CONFIDENCE))

    def with_length(self, samples: int | None) -> "Basis":
        """The same for so many samples, or the configured length. Raises `ConfigError` where nobody knows that."""
        steps = run_steps(self.models.base, self.models.record.trainer.train_rows)
        if samples is None and steps is None:
            what = "the probe does not tell how many rows a pass over the data has"
            raise ConfigError(what, where=self.source, fix="Give --samples N.")
        return replace(self, samples=samples or (steps or 0) * groups_per_step(self.models.base))

    def steps(self, config: RunConfig) -> int:
        return max(1, math.ceil(self.samples / groups_per_step(config) - 1e-9))

    def seconds(self, name: str, config: RunConfig, models: Models) -> Figure | None:
        """Seconds of one `step`, `evaluate` or `save`; None for an evaluation of nobody knows how many rows."""
        as_now, trainer = config == self.models.base and models is self.models, models.record.trainer
        known = self.measured[0] if name == "step" else self.once_s.get(name)
        if known is not None and (as_now or (name == "save" and models is self.models)):
            return around(known, self.measured[1], "measured")
        if name == "save":
            return around(CHECKPOINT_S * trainer.trainable_parameters, CHECKPOINT_REACH)
        rows, scale = trainer.held_out_rows or config.data.max_eval_samples, 1.0
        if name == "step":
            guess = models.step_s(config)
        elif rows is None or config.batch.eval_batch is None:
            return None
        else:
            guess = models.evaluation_s(config, rows)
            scale = known / self.models.evaluation_s(self.models.base, rows).value if known else 1.0
        doubt = math.log(guess.high / guess.value) if guess.value > 0.0 else 0.0
        doubts = doubt, self.measured[1], 0.0 if models is self.models else OTHER_MODEL
        return around(scale * guess.value, math.hypot(*doubts))

    def sample(self, config: RunConfig, models: Models | None = None) -> Figure:
        step = self.seconds("step", config, models or self.models)
        assert step is not None
        return step.times(1.0 / groups_per_step(config))

    def run(
        self, config: RunConfig, models: Models | None = None, eval_steps: int | None = None
    ) -> tuple[Figure, list[Occasion]]:
        """Seconds of the whole run (start, steps, evaluations, checkpoints), and its occasions; `eval_steps` replaces
        the configured distance, 0 for no evaluation."""
        steps, seen = self.steps(config), list[tuple[Literal["evaluate", "save"], int, int, Figure]]()
        for name in ("evaluate", "save"):
            every = steps_between(config, name, self.models.record.trainer.train_rows, steps)
            once = self.seconds(name, config, models or self.models) if every else None
            if every and once is not None:
                every = every if eval_steps is None or name == "save" else eval_steps
                seen.append((name, every, occasions_of(config, name, every, steps), once))
        start = around(math.fsum(phase.seconds for phase in self.models.record.startup), self.measured[1])
        step = self.sample(config, models).times(groups_per_step(config) * steps)
        parts = [start, step, *(once.times(often) for *_, often, once in seen)]
        # errors are one machine's pace, so that ends add up
        value, low, high = (math.fsum(float(part[end]) for part in parts) for end in range(3))
        whole = Figure(value, low, high)
        return whole, [
            Occasion(name=name, every=n, times=often, once_s=s, share=often * s.value / whole.value, total_s=whole)
            for name, n, often, s in seen
        ]

    def choice(self, name: str, knobs: Knobs, models: Models | None = None) -> Choice:
        """A row of a table. Raises `ConfigError` where the knobs do not fit together."""
        base, config, images = self.models.base, with_knobs(self.models.base, knobs), self.models.record.images
        side, sample, models = knobs.get(IMAGE_SIZE), self.sample(config, models), models or self.models
        now, fit = images.tokens.mean if images and images.tokens else None, fits(models, config, self.memory_bytes)
        remedies = (
            f"{key} {str(value).lower()}"
            for key, value in CHEAPER.items()
            if why_not(base, {key: value}, models.machine, models.record) is None
            and fits(models, with_knobs(base, {key: value}), self.memory_bytes)
        )
        return Choice(
            name=name,
            knobs=knobs,
            image_tokens=now if side is None else tokens_at(side, self.models.record, base, {}),
            sample_s=sample,
            total_s=self.run(config, models)[0],
            speed=self.sample(base).value / sample.value,
            peak_bytes=Figure(*models.peak_bytes(config, worst_case=True)[:3]),
            fits=fit,
            remedy=None if fit else next(remedies, None),
        )

    def image_sizes(self) -> Iterator[Choice]:
        """The size now, and listed ones that may differ from it; parts of it where it is below all of them."""
        now, images = self.models.base.data.image_size, self.models.record.images
        if images is None or images.tokens is None:
            return
        side = now or round(math.sqrt(images.pixels.p50))
        yield self.choice(f"{side} px (now)", {})
        sizes = [s for s in SIDES if s < side or (now and s > side)]
        for size in sizes or [side // 3, 2 * side // 3]:
            yield self.choice(f"{size} px", {IMAGE_SIZE: size})

    def group_sizes(self) -> Iterator[Choice]:
        """The size now, and usual ones: at the step's completions where they are whole groups, else at its prompts."""
        base = self.models.base
        yield self.choice(f"{base.batch.num_generations} (now)", {})
        for size in (size for size in GROUPS if size != base.batch.num_generations):
            for knobs in ({GROUP: size}, {GROUP: size, **knobs_of(base, [PROMPTS])}):
                with suppress(ConfigError):
                    yield self.choice(str(size), knobs)
                    break

    def sharding(self) -> Iterator[Choice]:
        """DeepSpeed's stage now, the other stages, and what can be kept on the host; none without DeepSpeed."""
        base, machine, record = self.models.base, self.models.machine, self.models.record
        if (sharding := record.trainer.sharding) is None:
            return
        yield self.choice(f"{sharding.name} (now)", {})
        for key in ZERO_KNOBS:
            for value in knob(key).values(context_of(base, machine, record))[1:]:
                if why_not(base, {key: value}, machine, record) is None:
                    of = key.split(".")[-2]
                    yield self.choice(f"ZeRO-{value}" if key == STAGE else f"{of}: {value}", {key: value})

    def other_models(self) -> Iterator[Choice]:
        """Every listed model in place of the measured one, at this machine's rates; text models where no image is."""
        for name, row in ARCHITECTURES.items():
            shape, peft = ModelShape.from_config(row.config), self.models.record.trainer.peft
            if shape.vision is not None or self.models.record.images is None:
                sizes = adapter_sizes(shape, peft) if peft else None
                trained = sizes.whole if sizes else shape.parameters
                other = self._with(model_config_json=dict(row.config), trainable_parameters=trained)
                yield self.choice(name, {}, other)

    def budget(self, memory_gb: float) -> dict[str, int | None]:
        """The largest values of three knobs that fit into so many 1e9 bytes, each with the others as they are."""
        config, plan, memory = self.models.base, self.models.base.batch, round(1e9 * memory_gb)
        # an engine takes its share of a card
        models = self._with(device_bytes=self.models.record.trainer.device_bytes and memory)
        values = {
            MICRO: divisors(plan.micro_batch * plan.accumulation),
            RANK: RANKS if config.peft else (),
            IMAGE_SIZE: SIDES if models.record.images is not None else (),
        }

        def fit(key: str, value: int) -> bool:
            legal = why_not(config, {key: value}, models.machine, models.record) is None
            return legal and fits(models, with_knobs(config, {key: value}), memory)

        return {key: max((value for value in some if fit(key, value)), default=None) for key, some in values.items()}

    def passes(self) -> Iterator[Pass]:
        """Passes of one sample through the model, counted from the configuration and the measured lengths."""
        config, record, tokens = self.models.base, self.models.record, self.models.record.tokens
        assert tokens is not None
        asked = (config, config.model_copy(update={"speedups": "auto"}))
        load, most = (workload(one, config, record, self.models.machine) for one in asked)
        facts, on, group = load.facts, "shared_prefix" in load.speedups, config.batch.num_generations
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

    def _with(self, **trainer: object) -> Models:
        """The models of the same probe under other facts of its trainer."""
        record = self.models.record
        update = {"trainer": record.trainer.model_copy(update=trainer)}
        return replace(self.models, record=record.model_copy(update=update))


def around(value: float, reach: float, how: Literal["measured", "predicted"] = "predicted") -> Figure:
    """A figure whose ends lie `reach` to either side, as a logarithm."""
    return Figure(value, value * math.exp(-reach), value * math.exp(reach), how)


def plan_of(basis: Basis, now: datetime, memory_gb: float | None = None, notes: tuple[str, ...] = ()) -> Plan:
    """Plan a run that begins now, for a memory in 1e9 bytes beside the usual ones. Raises `ConfigError` where nothing
    tells its length."""
    basis = basis if basis.samples else basis.with_length(None)
    config, tokens, trainer = basis.models.base, basis.models.record.tokens, basis.models.record.trainer
    assert tokens is not None
    (whole, occasions), sample = basis.run(config), basis.sample(config)
    evaluates = [row.every for row in occasions if row.name == "evaluate"]
    if not evaluates and config.batch.eval_batch is not None:
        unknown = "Evaluation is not counted: nothing tells its rows or how often it happens."
        notes = (f"{unknown} Probe again, or plan the CONFIG --with-eval.", *notes)
    return Plan(
        confidence=CONFIDENCE,
        source=basis.source,
        notes=list(notes),
        samples=round(basis.samples),
        steps=basis.steps(config),
        step_s=sample.times(groups_per_step(config)),
        sample_s=sample,
        total_s=whole,
        ends=[
            (now + timedelta(seconds=min(LATEST_S, s))).isoformat(" ", "minutes")
            for s in (whole.low, whole.value, whole.high)
        ],
        occasions=occasions,
        cadences=[basis.run(config, eval_steps=n * every)[1][0] for every in evaluates for n in CADENCES],
        memory_bytes=basis.memory_bytes,
        tables={
            "image size": list(basis.image_sizes()),
            "num_generations": list(basis.group_sizes()),
            "model": list(basis.other_models()),
            "sharding": list(basis.sharding()),
        },
        budgets={f"{gb:g} GB": basis.budget(gb) for gb in sorted({*BUDGETS_GB, memory_gb or BUDGETS_GB[0]})},
        passes=list(basis.passes()),
        supervised_tokens=(4 if trainer.gradient_checkpointing else 3) * (tokens.prompt.mean + tokens.completion.mean),
    )
