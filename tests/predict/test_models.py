"""Cost and memory models against a machine whose laws are known: what is predicted before and after trials."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError, NothingSucceeded
from grpo_autotune.estimate.architectures import ARCHITECTURES
from grpo_autotune.hardware import Machine
from grpo_autotune.knobs import engine, with_knobs
from grpo_autotune.predict.features import PARTS, SPARED, Rates, features
from grpo_autotune.predict.memory import components
from grpo_autotune.predict.models import Models, part_seconds, stage_seconds
from grpo_autotune.predict.regression import Fit, Observation, Place, first_guess
from grpo_autotune.predict.workload import Workload, expected_longest, mean_length, tokens_at, workload
from grpo_autotune.records.probe import STAGES, DeviceMemory, ProbeRecord, StageRow, StageTimings
from grpo_autotune.records.trial import TrialOutcome
from tests.knobs.test_knobs import GROUP, MICRO, config, machine
from tests.support.sample_records import image_facts, spread, token_facts, trainer_facts

GIB = 2**30
VL = ARCHITECTURES["qwen3-vl-2b"].config
FLOPS_S, BYTES_S = 2e12, 1e11
AXES: dict[str, list[Any]] = {
    "data.image_size": [768, 512, 384, 256],
    MICRO: [2, 1, 4, 8, 16],
    GROUP: [8, 4, 16],
    "grpo.gradient_checkpointing": [True, False],
    "model.attn_implementation": [None, "eager"],
}


def user_config(**changes: Any) -> RunConfig:
    grpo = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16, "beta": 0.04, "num_generations": 8}
    data = {"path": "p", "image_size": 768, "columns": {"image": "picture"}}
    return config(
        {"data": data, "peft": {"r": 8, "target_modules": "all-linear"}, "speedups": "none", **changes}, **grpo
    )


def probe_record(**changes: Any) -> ProbeRecord:
    """A probe of `user_config`; its timings come from `Truth`."""
    facts = {
        "trainer": trainer_facts(
            model_config_json=VL,
            parameters=2_130_000_000,
            trainable_parameters=10_000_000,
            peft={"peft_type": "LORA", "r": 8, "target_modules": "all-linear"},
            dtype="bfloat16",
            gradient_checkpointing=True,
            gradient_accumulation_steps=16,
            steps_per_generation=16,
            generation_batch_size=32,
            max_completion_length=256,
            attn_implementation="sdpa",
        ),
        "tokens": token_facts(prompt=spread(640, 650, 660), completion=spread(100, 200, 256), padding_share=0.1),
        "images": image_facts(
            pixels=spread(768**2, 768**2, 768**2),
            tokens=spread(576, 576, 576),
            tokens_at={"384": 144.0, "512": 256.0, "768": 576.0, "1024": 1024.0},
        ),
    }
    empty = StageTimings(steps=[], step_s=[], stages=[])
    return ProbeRecord(timings=empty, **(facts | changes))


class Truth:
    """A machine on which every part takes a fixed time a call and a known time an operation, and memory is the formula
    of its own; some per cent of noise."""

    def __init__(self, noise: float = 0.02, seed: int = 0) -> None:
        self.random, self.noise = random.Random(seed), noise
        self.user, self.machine = user_config(), machine()
        self.probe = self.outcome(self.user)

    def load(self, turned: RunConfig) -> Workload:
        return workload(turned, self.user, probe_record(), self.machine)

    def seconds(self, turned: RunConfig) -> dict[str, float]:
        """Noise-free seconds of each part."""
        found = {}
        for part, counts in features(self.load(turned), Rates(1.0)).items():
            price = {
                "calls": 0.02,
                "rows": 0.004,
                "steps": 0.03,
                "calls_again": 0.01,
                "parameters": 1e-10,
                "pixels": 1e-9,
            }
            total = 0.0
            for name, count in counts.items():
                if name.endswith("_flops"):
                    total += count / FLOPS_S * (2.0 if name.startswith("head") else 1.0)
                elif name.endswith("_bytes"):
                    total += count / BYTES_S * 0.3
                elif name.endswith(SPARED):
                    continue
                elif name.endswith("_scores"):
                    total += count * 6 / BYTES_S
                else:
                    total += price.get(name, 1e-4) * count
            found[part] = total
        return found

    def outcome(self, turned: RunConfig, number: int = 0, **changes: Any) -> TrialOutcome:
        """What a trial of `turned` brings: three steps."""
        parts = {part: [self._noisy(s) for _ in range(3)] for part, s in self.seconds(turned).items()}
        rows = []
        for stage in STAGES:
            held = {part: several for part, several in parts.items() if PARTS[part] == stage}
            told = held if stage == "policy_logprob" else {}
            per_step = [math.fsum(column) for column in zip(*held.values(), strict=True)] or [0.0] * 3
            rows.append(StageRow(name=stage, per_step_s=per_step, parts=told))
        steps = [math.fsum(column) for column in zip(*(row.per_step_s for row in rows), strict=True)]
        load = self.load(turned)
        base = probe_record()
        tokens = base.tokens.model_copy(update={"padding_share": load.facts.padding_share}) if base.tokens else None
        fewer = 576 - load.facts.image_tokens
        prompt = spread(640 - fewer, 650 - fewer, 660 - fewer)
        images = image_facts(
            pixels=spread(load.pixels, load.pixels, load.pixels),
            tokens=spread(load.facts.image_tokens, load.facts.image_tokens, load.facts.image_tokens),
        )
        record = base.model_copy(
            update={
                "timings": StageTimings(steps=[1, 2, 3], step_s=steps, stages=rows),
                "trainer": load.trainer,
                "tokens": tokens.model_copy(update={"prompt": prompt}) if tokens else None,
                "images": images,
            }
        )
        plain = {"number": number, "status": "ok", "record": record, "step_s": steps}
        memory = {"peak_bytes": round(self._noisy(self.memory(turned))) + GIB, "idle_bytes": GIB}
        return TrialOutcome(**(plain | memory | changes))

    def memory(self, turned: RunConfig) -> float:
        """Bytes beyond idle: four gigabytes, and what rows and checkpointing take."""
        facts = self.load(turned).facts
        a_row = 0.1 if facts.training.checkpointing else 0.8
        return (4.0 + facts.micro_batch * facts.row_tokens / 700 * a_row + facts.generation_rows * 0.05) * GIB

    def _noisy(self, value: float) -> float:
        return value * math.exp(self.random.gauss(0.0, self.noise))

    def models(self) -> Models:
        assert self.probe.record is not None
        return Models.from_probe(self.user, self.probe.record, self.machine, self.probe)

    def settings(self, count: int, seed: int = 1) -> list[RunConfig]:
        """Legal settings in a random order, the user's own left out."""
        found = []
        combinations = list(itertools.product(*AXES.values()))
        random.Random(seed).shuffle(combinations)
        for picked in combinations:
            try:
                turned = with_knobs(self.user, dict(zip(AXES, picked, strict=True)))
            except ConfigError:
                continue
            if turned != self.user:
                found.append(turned)
        return found[:count]


def off(predicted: float, true: float) -> float:
    return abs(predicted / true - 1.0)


def test_a_single_probe_predicts_itself_and_the_direction_of_every_knob() -> None:
    truth = Truth(noise=0.0)
    models = truth.models()
    assert off(models.step_s(truth.user).value, math.fsum(truth.seconds(truth.user).values())) < 0.02
    own = models.step_s(truth.user).value
    assert models.step_s(with_knobs(truth.user, {"data.image_size": 384})).value < 0.8 * own
    assert models.step_s(with_knobs(truth.user, {"grpo.gradient_checkpointing": False})).value < own
    assert models.step_s(with_knobs(truth.user, {MICRO: 16})).value < own
    assert models.step_s(with_knobs(truth.user, {"prompts_per_step": 8})).value > 1.7 * own


def test_a_dozen_trials_teach_the_machine() -> None:
    truth = Truth()
    models = truth.models()
    for number, turned in enumerate(truth.settings(14)):
        models = models.learn(turned, truth.outcome(turned, number))
    unseen = truth.settings(60)[14:]
    errors, memory = [], []
    for turned in unseen:
        true = truth.seconds(turned)
        stages = models.stages_s(turned)
        for stage in ("generation", "policy_logprob", "reference_logprob", "backward"):
            errors.append(off(stages[stage].value, math.fsum(s for part, s in true.items() if PARTS[part] == stage)))
        memory.append(off(models.peak_bytes(turned).value - GIB, truth.memory(turned)))
    assert sorted(errors)[len(errors) // 2] < 0.05
    assert sorted(errors)[int(0.9 * len(errors))] < 0.12
    assert sorted(memory)[len(memory) // 2] < 0.1


def test_intervals_narrow_and_hold_the_truth() -> None:
    truth = Truth()
    models = truth.models()
    turned = truth.settings(40)[-1]
    first = models.step_s(turned)
    for number, other in enumerate(truth.settings(14)):
        models = models.learn(other, truth.outcome(other, number))
    last = models.step_s(turned)
    assert first.low < first.value < first.high
    assert math.log(last.high / last.low) < 0.6 * math.log(first.high / first.low)
    unseen = truth.settings(60)[14:]
    held = sum(p.low <= math.fsum(truth.seconds(c).values()) <= p.high for c in unseen if (p := models.step_s(c)))
    assert held >= 0.85 * len(unseen)


def test_errors_are_of_predictions_made_before_learning() -> None:
    truth = Truth(noise=0.0)
    models = truth.models()
    assert models.errors() == {}
    turned = truth.settings(1)[0]
    before = models.step_s(turned).value
    outcome = truth.outcome(turned)
    learnt = models.learn(turned, outcome)
    measured = outcome.step_s[0]
    assert learnt.errors()["step"] == pytest.approx(
        {"median": off(before, measured), "p90": off(before, measured), "n": 1}
    )
    assert learnt.errors().keys() >= {"generation", "backward", "memory"}
    assert off(learnt.step_s(turned).value, measured) < 0.03, "what was measured is known"
    assert models.errors() == {}, "models are frozen"


def test_learning_the_same_outcomes_again_gives_the_same_models() -> None:
    truth = Truth()
    settings = truth.settings(5)
    outcomes = [TrialOutcome.model_validate_json(truth.outcome(c).model_dump_json()) for c in settings]

    def learnt() -> Models:
        models = truth.models()
        for turned, outcome in zip(settings, outcomes, strict=True):
            models = models.learn(turned, outcome)
        return models

    one, two = learnt(), learnt()
    assert one.errors() == two.errors()
    assert [one.step_s(c) for c in truth.settings(9)] == [two.step_s(c) for c in truth.settings(9)]
    assert [one.peak_bytes(c) for c in settings] == [two.peak_bytes(c) for c in settings]


@pytest.mark.parametrize("status", ["crashed", "hang", "timeout", "killed", "invalid", "reward_failed"])
def test_trials_that_failed_otherwise_teach_nothing(status: Any) -> None:
    truth = Truth()
    models = truth.models()
    assert models.learn(truth.user, TrialOutcome(number=1, status=status, peak_bytes=9 * GIB, idle_bytes=GIB)) is models


def test_running_out_of_memory_is_learnt() -> None:
    truth = Truth()
    models = truth.models()
    greedy = with_knobs(truth.user, {MICRO: 16, "grpo.gradient_checkpointing": False})
    larger = with_knobs(truth.user, {MICRO: 32, "grpo.gradient_checkpointing": False})
    limit = round(2 * models.peak_bytes(greedy, worst_case=True).value)
    oom = TrialOutcome(number=1, status="oom", peak_bytes=limit, idle_bytes=GIB)
    after = models.learn(greedy, oom)
    assert after.peak_bytes(greedy, worst_case=True).value >= 0.99 * limit
    assert after.peak_bytes(larger, worst_case=True).value > after.peak_bytes(greedy, worst_case=True).value
    assert after.peak_bytes(truth.user).value < limit
    assert after.step_s(greedy) == models.step_s(greedy)


def test_the_worst_case_is_never_less() -> None:
    truth = Truth()
    models = truth.models()
    for turned in truth.settings(10):
        assert models.peak_bytes(turned, worst_case=True).value >= models.peak_bytes(turned).value


def test_speed_ups_are_learnt_apart() -> None:
    truth = Truth(noise=0.0)
    models = truth.models()
    fast = with_knobs(truth.user, {"speedups": "auto"})
    doubt = models.step_s(fast)
    assert doubt.high > 1.5 * doubt.value, "nobody has tried it"
    alone = with_knobs(truth.user, {"speedups": ["reward_overlap"]})
    assert doubt.value < 0.8 * models.step_s(alone).value, "what is shared is not counted for every copy"
    learnt = models.learn(fast, truth.outcome(fast))
    assert off(learnt.step_s(fast).value, math.fsum(truth.seconds(fast).values())) < 0.03
    assert learnt.step_s(truth.user).value == models.step_s(truth.user).value, "plain trials are told apart"
    smaller = with_knobs(fast, {"data.image_size": 384})
    assert off(learnt.step_s(smaller).value, math.fsum(truth.seconds(smaller).values())) < 0.15


@pytest.mark.parametrize(
    "knobs",
    [{"model.attn_implementation": "eager"}, {"grpo.torch_compile": True}, {"speedups": ["images_once"]}],
)
def test_a_shared_prefix_that_cannot_work_spares_nothing(knobs: dict[str, Any]) -> None:
    truth = Truth(noise=0.0)
    fast = with_knobs(truth.user, {"speedups": "auto"})

    def shared(turned: RunConfig) -> bool:
        return "shared_prefix" in workload(turned, truth.user, probe_record(), truth.machine).speedups

    assert shared(fast) and not shared(with_knobs(fast, knobs))


def test_merged_passes_are_counted_as_they_run() -> None:
    """Micro batches of two, groups of eight: as many calls as passes, and the prompt once for the rows of a pass."""
    truth = Truth(noise=0.0)

    def of(*names: str) -> tuple[float, float, float]:
        load = truth.load(with_knobs(truth.user, {"speedups": list(names)}))
        counts = features(load, Rates(1.0))["backward"]
        return load.merged, counts["calls"], counts["text_flops"]

    merged, calls, flops = of("shared_prefix", "merge_passes")
    _, calls_apart, flops_apart = of("shared_prefix")
    assert merged > 1.0 and calls == calls_apart / merged == 16.0 / merged
    assert flops < flops_apart
    assert of("merge_passes") == of(), "without shared prompts there is no room"


def test_adapters_that_copy_their_input_need_more_memory() -> None:
    """Three copies of the hidden state and one of attention's output, a token and layer, in bfloat16; of the tower's
    blocks, which have one matrix for query, key and value, attention's output."""
    truth = Truth(noise=0.0)
    apart = {"grpo.gradient_checkpointing": False}
    plain, fast = (
        components(truth.load(with_knobs(truth.user, {**apart, "speedups": names})))["activations"]
        for names in ("none", ["lora_input"])
    )
    load = truth.load(with_knobs(truth.user, apart))
    shape, tokens = load.shape, load.facts.micro_batch * load.sizes.row
    assert shape is not None and shape.vision is not None
    text = tokens * shape.layers * (3 * shape.hidden + shape.attention_width)
    tower = load.facts.micro_batch * 48 * 48 * shape.vision.depth * shape.vision.hidden
    assert plain - fast == pytest.approx(2 * (text + tower))


def test_what_no_formula_describes_is_learnt_by_knob() -> None:
    """Work at a price of 1e-9 s, a tenth more under the word `slow`; tried at some sizes, asked at others."""

    def seen(flops: float, word: str) -> Observation:
        seconds = 0.1 + flops * 1e-9 * (1.1 if word == "slow" else 1.0)
        return Observation({"calls": 1.0, "text_flops": flops}, seconds, Place((math.log2(flops),), (word,)))

    fit = Fit(tuple(seen(1e9 * size, word) for size in (1, 2, 4, 8) for word in ("fast", "slow")))
    for word in ("fast", "slow"):
        wanted = seen(3e9, word)
        assert off(fit.predict(wanted.features, wanted.place).mean, wanted.seconds) < 0.03
    strange = fit.predict({"calls": 1.0, "text_flops": 3e9}, Place((math.log2(3e9),), ("new",)))
    known = fit.predict({"calls": 1.0, "text_flops": 3e9}, Place((math.log2(3e9),), ("fast",)))
    assert strange.spread > known.spread


def test_what_the_probe_did_not_have_costs_what_its_like_costs() -> None:
    probe = Observation({"calls": 2.0, "steps": 100.0, "text_flops": 1e9, "rows": 8.0}, 10.0, Place((1.0,), ("a",)))
    guess = first_guess(
        probe, ["calls", "steps", "rows", "text_flops", "steps@vllm", "tower_flops", "calls_again", "odd"]
    )
    told = math.fsum(guess[name] * count for name, count in probe.features.items())
    assert told == pytest.approx(10.0)
    assert guess["steps@vllm"] == guess["steps"]
    assert guess["tower_flops"] == guess["text_flops"]
    assert guess["calls_again"] == guess["calls"]
    assert guess["odd"] < 1e-12


def test_loader_workers_and_vllm_get_a_finite_guess() -> None:
    truth = Truth(noise=0.0)
    models = truth.models()
    own = models.step_s(truth.user).value
    for knobs in ({"grpo.dataloader_num_workers": 2}, {"grpo.use_vllm": True}, {"grpo.torch_compile": True}):
        assert 0.3 * own < models.step_s(with_knobs(truth.user, knobs)).value < 3 * own


def test_a_lucky_trial_with_loader_workers_teaches_nothing_but_the_loading() -> None:
    truth = Truth(noise=0.0)
    turned = with_knobs(truth.user, {"grpo.dataloader_num_workers": 2})
    lucky = truth.outcome(turned, 1)
    assert lucky.record is not None
    rows = [
        row.model_copy(update={"per_step_s": [0.88 * s for s in row.per_step_s]}) for row in lucky.record.timings.stages
    ]
    timings = lucky.record.timings.model_copy(update={"stages": rows})
    record = lucky.record.model_copy(update={"timings": timings})
    models = truth.models().learn(turned, lucky.model_copy(update={"record": record}))
    own, workers = models.stages_s(truth.user), models.stages_s(turned)
    assert [stage for stage in own if workers[stage].value != pytest.approx(own[stage].value)] in ([], ["data"])


def test_a_stage_that_the_probe_did_not_have_takes_what_the_first_trial_measured() -> None:
    """A probe under `generate` pushes no weights, and no trial's seconds are the probe's."""
    truth = Truth(noise=0.0)
    record = truth.probe.record
    assert record is not None
    stages = [
        row.model_copy(update={"per_step_s": [0.0] * 3}) if row.name in ("weight_sync", "engine") else row
        for row in record.timings.stages
    ]
    probed = record.model_copy(update={"timings": record.timings.model_copy(update={"stages": stages})})
    models = Models.from_probe(truth.user, probed, truth.machine, truth.probe)
    with_engine = with_knobs(truth.user, {"grpo.use_vllm": True})
    told = models.learn(with_engine, truth.outcome(with_engine, 1)).stages_s(with_engine)
    assert told["weight_sync"].value == pytest.approx(truth.seconds(with_engine)["weight_sync"])


def engine_bytes(monkeypatch: pytest.MonkeyPatch, gpus: int, worst_case: bool, space: str = "", **vllm: Any) -> float:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    user = config({"vllm": vllm}, use_vllm=True)
    load = workload(user, user, probe_record(), machine(gpus), worst_case=worst_case)
    return load.sizes.engine_bytes


def test_the_engines_memory_is_its_share_of_a_gpu_and_fills_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card, host = machine(1).gpus[0].memory_bytes, machine().memory_bytes
    for worst_case in (False, True):
        assert engine_bytes(monkeypatch, 1, worst_case, gpu_memory_utilization=0.5) == 0.5 * card
    assert engine_bytes(monkeypatch, 1, True, mode="server") == 0.0
    few = [engine_bytes(monkeypatch, 0, False, gpu_memory_utilization=share, max_num_seqs=2) for share in (0.6, 0.7)]
    assert 0.0 < few[0] == few[1] < engine_bytes(monkeypatch, 0, False, gpu_memory_utilization=0.7, max_num_seqs=4)
    in_the_end = [engine_bytes(monkeypatch, 0, True, gpu_memory_utilization=share) for share in (0.6, 0.7)]
    assert in_the_end[1] - in_the_end[0] == pytest.approx(0.1 * host, rel=1e-6)
    spaces = [engine_bytes(monkeypatch, 0, True, space=space) for space in ("8", "9")]
    assert spaces[1] - spaces[0] == 2**30


def test_completions_that_take_turns_take_longer() -> None:
    def steps(**vllm: Any) -> float:
        user = config({"vllm": vllm}, use_vllm=True)
        load = workload(user, config(), probe_record(), machine(1))
        return features(load, Rates(1.0))["generation"]["steps@vllm"]

    assert steps(max_num_seqs=8) == 2 * steps() and steps(max_num_seqs=4) == 4 * steps()


def test_the_engines_settings_are_learnt_as_the_words_they_are() -> None:
    words = [engine.word(config({"vllm": vllm}, use_vllm=True)) for vllm in ({}, {"weight_sync": "batched"})]
    assert len({*words, engine.word(config())}) == 3
    assert engine.word(config({"vllm": {"max_num_seqs": 4}}, use_vllm=True)) == words[0]  # the formula knows it


def test_a_trial_of_rewards_alone_teaches_no_memory() -> None:
    truth = Truth()
    models = truth.models()
    rewards = TrialOutcome(number=1, status="ok", peak_bytes=50 * GIB, idle_bytes=GIB)
    assert models.learn(truth.user, rewards).peak_bytes(truth.user) == models.peak_bytes(truth.user)


def test_a_pass_that_was_never_timed_is_priced_as_the_training_forward() -> None:
    truth = Truth(noise=0.0)
    off_policy = with_knobs(truth.user, {"grpo.steps_per_generation": 32})
    stages = truth.models().stages_s(off_policy)
    assert stages["policy_logprob"].value > 1.5 * truth.models().stages_s(truth.user)["policy_logprob"].value


def test_an_unknown_architecture_still_gets_an_answer() -> None:
    truth = Truth()
    assert truth.probe.record is not None
    strange = {"model_type": "mystery", "num_experts": 8, "hidden_size": 64}
    trainer = truth.probe.record.trainer.model_copy(update={"model_config_json": strange})
    record = truth.probe.record.model_copy(update={"trainer": trainer})
    models = Models.from_probe(truth.user, record, truth.machine, truth.probe)
    own = models.step_s(truth.user).value
    assert off(own, truth.probe.step_s[0]) < 0.1
    assert models.step_s(with_knobs(truth.user, {"data.image_size": 384})).value < own
    assert models.peak_bytes(truth.user).value > GIB


def test_a_record_alone_tells_memory_too() -> None:
    truth = Truth()
    assert truth.probe.record is not None
    models = Models.from_probe(truth.user, truth.probe.record, truth.machine)
    guess = models.peak_bytes(truth.user)
    assert 0 < guess.low < guess.value < guess.high


def test_a_probe_without_a_step_is_refused() -> None:
    with pytest.raises(NothingSucceeded, match="the probe measured no whole step"):
        Models.from_probe(user_config(), probe_record(), machine())


def test_lengths_of_a_batch() -> None:
    lengths = spread(100, 200, 256)
    assert expected_longest(lengths, 1) == pytest.approx(100, rel=0.1)
    assert 200 < expected_longest(lengths, 16) < 256 + 1e-9
    assert expected_longest(lengths, 10_000) == pytest.approx(256, rel=0.01)
    assert expected_longest(lengths, 64, cap=128) == 128
    assert mean_length(lengths, 128) < mean_length(lengths) == 100
    same = spread(48, 48, 48)
    assert expected_longest(same, 64) == mean_length(same, 64) == 48


def test_tokens_at_other_sizes() -> None:
    user, record = user_config(), probe_record()
    assert tokens_at(384, record, user, {}) == 144
    assert tokens_at(640, record, user, {}) == pytest.approx(400)
    assert tokens_at(640, record, user, {"640": 390.0}) == 390
    native = user_config(data={"path": "p", "columns": {"image": "picture"}})
    assert tokens_at(2048, record, native, {}) == 576, "no image is enlarged"


def test_cycles_count_whole() -> None:
    rows = [StageRow(name="generation", per_step_s=[4.0, 0.0, 4.0, 0.0, 4.0])]
    rows += [StageRow(name="other", per_step_s=[1.0] * 5)]
    timings = StageTimings(steps=[1, 2, 3, 4, 5], step_s=[5.0, 1.0, 5.0, 1.0, 5.0], stages=rows, cycle=2)
    assert stage_seconds(timings) == part_seconds(timings) == {"generation": 2.0, "other": 1.0}


def test_models_need_a_machine_of_any_kind() -> None:
    truth, gpu = Truth(), machine(gpus=1)
    assert truth.probe.record is not None
    trainer = truth.probe.record.trainer.model_copy(update={"device": "cuda"})
    record = truth.probe.record.model_copy(update={"trainer": trainer})
    models = Models.from_probe(truth.user, record, gpu, truth.probe)
    assert isinstance(gpu, Machine) and models.step_s(truth.user).value > 0.0
    larger = with_knobs(truth.user, {MICRO: 8, "grpo.gradient_checkpointing": False})
    assert models.peak_bytes(larger).value > models.peak_bytes(truth.user).value
    oom = TrialOutcome(number=1, status="oom", peak_bytes=400 * GIB, idle_bytes=GIB)
    told = models.learn(larger, oom).peak_bytes(larger, worst_case=True)
    assert told == models.peak_bytes(larger, worst_case=True), "it was the host's memory that ran out"
    figures = {"allocated_bytes": 0, "outside_bytes": 0, "device_bytes": 0, "retries": 0, "failures": 1}
    device = oom.model_copy(update={"device_memory": DeviceMemory(reserved_bytes=400 * GIB, **figures)})
    assert models.learn(larger, device).peak_bytes(larger, worst_case=True).value > 300 * GIB
