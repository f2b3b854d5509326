"""The report: its sums, its numbers, and its way to disk and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_autotune.errors import ConfigError, NothingSucceeded
from grpo_autotune.estimate.passes import Work
from grpo_autotune.hardware import Ceilings, detect
from grpo_autotune.probe.breakdown import Limit
from grpo_autotune.records.probe import STAGES, ProbeRecord, RankTimings, StageRow, StageTimings, Utilisation
from grpo_autotune.records.report import Report, StageReport
from grpo_autotune.render.sentences import header_lines
from grpo_autotune.render.terminal import render
from grpo_autotune.report.build import build_report
from grpo_autotune.report.files import load_report, save_report
from grpo_autotune.report.limits import limit_of
from tests.support.sample_records import (
    CPU_MACHINE,
    config_of,
    demo_record,
    judged_record,
    remote_calls,
    timings,
    token_facts,
    trainer_facts,
    two_rank_record,
    vllm_record,
)

REPORT_PAGE = Path(__file__).parents[2] / "docs" / "report.md"


@st.composite
def any_timings(draw: st.DrawFn) -> StageTimings:
    """Steps whose stages sum to them, in cycles of 1 to 4, with at least one second measured."""
    steps, cycle = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    seconds = st.floats(0.0, 1e4, allow_nan=False)
    columns = [draw(st.lists(seconds, min_size=steps, max_size=steps)) for _ in STAGES]
    columns[0] = [value + 1.0 for value in columns[0]]
    return StageTimings(
        steps=list(range(steps)),
        step_s=[sum(column[i] for column in columns) for i in range(steps)],
        stages=[StageRow(name=name, per_step_s=column) for name, column in zip(STAGES, columns, strict=True)],
        cycle=cycle,
    )


@settings(deadline=None, max_examples=50)
@given(any_timings())
def test_stages_sum_to_the_step(times: StageTimings) -> None:
    report = build_report(demo_record(timings=times))
    assert sum(row.self_s for row in report.stages) == pytest.approx(report.step_s, abs=1e-6)
    assert sum(row.share for row in report.stages) == pytest.approx(1.0, abs=1e-9)
    assert [row.name for row in report.stages] == list(STAGES)
    assert min(times.step_s) - 1e-9 <= report.step_s <= max(times.step_s) + 1e-9


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(any_timings())
def test_a_report_is_equal_after_json(times: StageTimings) -> None:
    report = build_report(demo_record(timings=times), CPU_MACHINE)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_step_is_the_median_and_stages_keep_their_raw_means() -> None:
    skewed = StageTimings(
        steps=[1, 2, 3],
        step_s=[2.0, 2.0, 8.0],
        stages=[
            StageRow(name="generation", per_step_s=[1.0, 1.0, 7.0], parts={"generate": [0.5, 0.5, 3.5]}),
            StageRow(name="backward", per_step_s=[1.0, 1.0, 1.0], host_s=[0.1, 0.2, 0.3]),
        ],
    )
    report = build_report(demo_record(timings=skewed))
    generation, backward = report.stages
    assert report.step_s == 2.0
    assert generation.share == pytest.approx(0.75) and generation.self_s == pytest.approx(1.5)
    assert generation.mean_s == pytest.approx(3.0) and generation.spread == pytest.approx(1.5)
    assert generation.parts[0].self_s == pytest.approx(0.75) and generation.parts[0].share == pytest.approx(0.375)
    assert backward.host_s == pytest.approx(0.2) and backward.spread == 0.0


def test_steps_that_take_turns_are_counted_by_whole_cycles() -> None:
    turns = StageTimings(
        steps=[1, 2, 3, 4, 5],
        step_s=[5.0, 1.0, 5.0, 1.0, 5.0],
        stages=[
            StageRow(
                name="generation", per_step_s=[4.0, 0.0, 4.0, 0.0, 4.0], host_s=[0.4, 0.0, 0.4, 0.0, 0.4], calls=0.6
            ),
            StageRow(name="backward", per_step_s=[1.0] * 5),
        ],
        cycle=2,
    )
    report = build_report(demo_record(timings=turns))
    assert report.step_s == pytest.approx(3.0) and report.step_spread_s == 0.0
    assert report.stages[0].self_s == pytest.approx(2.0) and report.stages[0].spread == 0.0
    # The fifth step begins a third cycle that is not whole.
    assert report.stages[0].mean_s == pytest.approx(2.0)
    assert report.stages[0].host_s == pytest.approx(0.2)
    assert "3.00 s per optimizer step (median of 2 cycles of 2 steps)" in render(report)


def test_less_than_a_whole_cycle_is_said() -> None:
    def cycle(length: int) -> Report:
        return build_report(demo_record(timings=timings({"backward": 1.0}, cycle=length)))

    assert not any("whole cycle" in line for line in [*cycle(1).warnings, *cycle(3).warnings])
    assert "one cycle of 3 steps" in render(cycle(3))
    (warning,) = cycle(4).warnings
    assert "do not hold a whole cycle" in warning and "4 steps here (3 measured)" in warning
    assert "median of 3 steps" in render(cycle(4))


@pytest.mark.slow
@pytest.mark.parametrize("entrance", [["-m", "grpo_autotune", "report"], ["-c", "import grpo_autotune.commands.run"]])
def test_a_stored_report_is_printed_and_a_script_started_without_the_predictor(
    entrance: list[str], tmp_path: Path
) -> None:
    """A script may set its threads before numpy is loaded."""
    save_report(build_report(demo_record()), tmp_path)
    place = [str(tmp_path)] if "-m" in entrance else []
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *entrance, *place], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "grpo_autotune.report.files" in loaded
    assert not loaded & {"numpy", "scipy", "torch", "grpo_autotune.predict", "grpo_autotune.advice"}


def test_nothing_measured_is_said() -> None:
    with pytest.raises(NothingSucceeded, match="no optimizer step was measured"):
        build_report(demo_record(timings=StageTimings(steps=[], step_s=[], stages=[])))


def test_ms_per_token_counts_completion_tokens_for_generation_only() -> None:
    report = build_report(demo_record())
    assert report.stage("generation").ms_per_token == pytest.approx(1200 / 192)
    assert report.stage("backward").ms_per_token == pytest.approx(1600 / (2560 + 192))
    assert build_report(demo_record(tokens=None)).stage("backward").ms_per_token is None


def test_tokens_trained_on_several_times_count_as_often() -> None:
    report = build_report(demo_record(trainer=trainer_facts(num_iterations=4)))
    trained, generated = 4 * (2560 + 192), 2560 + 192
    assert report.stage("policy_logprob").ms_per_token == pytest.approx(900 / trained)
    assert report.stage("backward").ms_per_token == pytest.approx(1600 / trained)
    assert report.stage("optimizer").ms_per_token == pytest.approx(20 / trained)
    assert report.stage("generation").ms_per_token == pytest.approx(1200 / 192)
    assert report.stage("reference_logprob").ms_per_token == pytest.approx(700 / generated)
    # verl divides the seconds of all its epochs by the tokens of the generated batch.
    assert report.metrics["timing_per_token_ms/update_actor"] == pytest.approx((900 + 1600 + 20) / generated)
    assert "each counts 4 times" in " ".join(render(report).split())


def test_rates_over_all_ranks() -> None:
    rates = build_report(two_rank_record()).rates
    assert rates is not None
    assert rates.completion_tokens_per_s == pytest.approx(2 * 192 / 4.52)
    assert rates.tokens_per_s == pytest.approx(2 * (2560 + 192) / 4.52)
    # 32 completions a generation batch are 4 groups, of which nine in ten live.
    assert rates.useful_completions_per_s == pytest.approx(4 * 0.9 * 7 / 4.52)


def test_useful_completions_count_a_reused_batch_once_and_leave_masked_ones_out() -> None:
    reused = demo_record(
        trainer=trainer_facts(num_iterations=2, mask_truncated_completions=True),
        tokens=token_facts(truncated_share=0.5),
    )
    rates = build_report(reused, config=config_of(reused)).rates
    assert rates is not None
    assert rates.useful_completions_per_s == pytest.approx(2 / 2 * 0.9 * (8 * 0.5 - 1) / 5.04)
    unseen = build_report(demo_record(tokens=token_facts(groups=0, dead_groups=0, pass_rates=[]))).rates
    assert unseen is not None and unseen.useful_completions_per_s is None


def test_zero_useful_completions_have_a_reason() -> None:
    dead = build_report(demo_record(tokens=token_facts(dead_groups=20, pass_rates=[0.0] * 20))).rates
    masks = trainer_facts(mask_truncated_completions=True)
    cut = build_report(demo_record(trainer=masks, tokens=token_facts(truncated_share=1.0)))
    assert dead is not None and dead.useless == "each group's rewards were equal"
    assert cut.rates is not None and cut.rates.useful_completions_per_s == 0.0
    assert "0 useful completions/s (100% of the completions were cut off and masked)" in header_lines(cut)
    alive = build_report(demo_record()).rates
    assert alive is not None and alive.useless is None


def test_calls_of_a_step_and_cost_of_the_run_over_all_ranks() -> None:
    ranks = judged_record(trainer=trainer_facts(world_size=2, num_iterations=2))
    (one,) = build_report(ranks, config=config_of(ranks)).remote
    assert one.calls_per_step == pytest.approx(16.0), "a row per completion, in every second step, on two ranks"
    assert one.tokens_per_step == pytest.approx(16 * 1050)
    assert one.cost_per_step == pytest.approx(16 * 0.0005) and one.cost_per_run == pytest.approx(0.8)
    (free,) = build_report(judged_record(remote_calls(cost=None)), config=None).remote
    assert free.cost_per_step is free.cost_per_run is None


def test_familiar_metrics() -> None:
    metrics = build_report(vllm_record()).metrics
    assert metrics["timing_s/step"] == metrics["perf/time_per_step"] == pytest.approx(35.0)
    assert metrics["timing_s/update_actor"] == pytest.approx(3.2 + 11.0 + 0.3)
    assert metrics["timing_s/old_log_prob"] == pytest.approx(2.8)
    assert metrics["timing_per_token_ms/gen"] == pytest.approx(9000 / 4800)
    assert metrics["perf/throughput"] == pytest.approx(7200 / 35.0)
    assert metrics["perf/weight_sync_s"] == pytest.approx(1.5)
    assert "timing_s/ref" not in metrics
    ranks = build_report(two_rank_record()).metrics
    assert ranks["perf/total_num_tokens"] == pytest.approx(2 * 2752)
    assert ranks["perf/throughput"] == pytest.approx(2752 / 4.52)


def test_ranks_mean_slowest_and_straggler() -> None:
    report = build_report(two_rank_record())
    assert report.ranks is not None and report.ranks.world_size == 2
    generation = next(row for row in report.ranks.stages if row.name == "generation")
    assert (generation.mean_s, generation.slowest_s, generation.slowest_rank) == (pytest.approx(1.6), 2.0, 1)
    (straggler,) = report.ranks.stragglers
    assert (straggler.rank, straggler.stage) == (1, "generation") and straggler.extra_s == pytest.approx(0.8)
    assert straggler.others_wait_s == pytest.approx(0.8)
    assert [row.compute_s for row in report.ranks.rows] == pytest.approx([3.72, 4.52])
    assert [row.wait_s for row in report.ranks.rows] == [0.8, 0.0]
    even = [RankTimings(rank=r, step_s=1.0, stages={"backward": 1.0}) for r in range(2)]
    balanced = build_report(demo_record(ranks=even)).ranks
    assert balanced is not None and balanced.stragglers == []
    assert build_report(demo_record()).ranks is None


@pytest.mark.parametrize("record", [demo_record(), vllm_record(), two_rank_record()])
def test_saved_and_loaded_is_the_same(record: ProbeRecord, tmp_path: Path) -> None:
    report = build_report(record, config=config_of(record))
    path = save_report(report, tmp_path / "run")
    assert load_report(path) == load_report(tmp_path / "run") == report
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.json"]
    data = json.loads(path.read_text())
    assert data["schema"] == Report.schema_name()
    assert {"step_s", "stages", "verdict", "fidelity", "startup", "images", "tokens", "machine", "config"} <= set(data)
    assert {"name", "self_s", "share", "spread", "ms_per_token", "limit_share", "peak_bytes"} <= set(data["stages"][0])


def test_the_dump_names_the_schema_without_being_asked() -> None:
    assert build_report(demo_record()).model_dump(mode="json")["schema"] == Report.schema_name()


def _damaged(text: str) -> str:
    data = json.loads(text)
    del data["stages"][0]["share"]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda text: "{", "not a JSON file"),
        (lambda text: "[]", "schema None"),
        (lambda text: text.replace(Report.schema_name(), "grpo-autotune/report/0"), "report/0"),
        (_damaged, "stages.0.share"),
    ],
)
def test_a_report_that_cannot_be_read_is_one_clear_error(spoil: Any, word: str, tmp_path: Path) -> None:
    path = save_report(build_report(demo_record()), tmp_path)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ConfigError, match=word) as caught:
        load_report(tmp_path)
    assert str(path) in str(caught.value)


def test_no_report_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no report here"):
        load_report(tmp_path)


def test_every_key_of_the_report_is_documented() -> None:
    page = REPORT_PAGE.read_text(encoding="utf-8")
    keys = [*Report.model_json_schema(by_alias=True)["properties"], *StageReport.model_fields]
    missing = [key for key in keys if f"`{key}`" not in page]
    assert missing == []


def test_a_stage_that_never_ran_is_listed_with_zero() -> None:
    row = build_report(demo_record(timings=timings({"backward": 1.0}))).stage("engine")
    assert (row.self_s, row.share, row.calls, row.peak_bytes) == (0.0, 0.0, 0.0, None)


FULL_SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
}


def ceilings_of(matrix_flops_s: float, memory_bytes_s: float) -> Ceilings:
    return Ceilings(
        device="cpu",
        dtype="float32",
        threads=1,
        matrix_flops_s=matrix_flops_s,
        memory_bytes_s=memory_bytes_s,
        matrix_side=512,
        measured_s=2.0,
    )


def test_limits_need_ceilings_tokens_and_a_known_shape() -> None:
    slow = ceilings_of(1e9, 1e8)
    text = demo_record(trainer=trainer_facts(model_config_json=FULL_SHAPE, peft=None), images=None)
    limited = {row.name for row in build_report(text, ceilings=slow).stages if row.limit_share is not None}
    assert limited == {"generation", "policy_logprob", "reference_logprob", "backward", "optimizer"}
    for record, ceilings in (
        (text, None),
        (text.model_copy(update={"tokens": None}), slow),
        (demo_record(trainer=trainer_facts(model_config_json={"hidden_size": 8})), slow),
    ):
        assert all(row.limit_share is None for row in build_report(record, ceilings=ceilings).stages)


def test_work_that_a_speed_up_leaves_out_has_no_limit() -> None:
    trainer = trainer_facts(model_config_json=FULL_SHAPE, peft=None, speedups=["shared_prefix", "images_once"])
    report = build_report(demo_record(trainer=trainer, images=None), ceilings=ceilings_of(1e9, 1e8))
    assert {row.name for row in report.stages if row.limit_share is not None} == {"generation", "optimizer"}
    assert "Speed-ups: shared_prefix, images_once" in render(report)


def test_a_limit_counts_the_work_that_speed_ups_left() -> None:
    def limits(speedups: dict[str, dict[str, float]], **seen: Any) -> dict[str, float]:
        trainer = trainer_facts(model_config_json=FULL_SHAPE, peft=None, speedups=list(speedups), device="cuda")
        record = demo_record(trainer=trainer, images=None, speedups=speedups, **seen)
        stages = build_report(record, ceilings=ceilings_of(1e15, 1e14)).stages
        return {row.name: row.limit_share for row in stages if row.limit_share is not None}

    plain = limits({})
    half = limits({"shared_prefix": {"shared_passes": 4.0, "tokens": 500.0, "tokens_of_plain": 1000.0}})
    assert half.keys() == plain.keys() and half["generation"] == plain["generation"]
    assert 0.5 * plain["backward"] < half["backward"] < 0.7 * plain["backward"]
    dead = limits({"skip_dead": {"rows": 8.0, "skipped_rows": 2.0}}, living_shares=[1.0, 0.5])
    assert dead["backward"] == pytest.approx(0.75 * plain["backward"])
    assert dead["reference_logprob"] == plain["reference_logprob"]
    shared = {"rows": 16.0, "prompts": 2.0, "row_steps": 50.0, "row_steps_of_plain": 100.0}
    assert limits({"shared_prefill": shared})["generation"] < 0.6 * plain["generation"]


def test_a_limit_is_the_longer_of_arithmetic_and_traffic_in_each_phase() -> None:
    ceilings = ceilings_of(10.0, 100.0)
    # The first phase needs 2 s for its operations, the second 3 s for its bytes.
    work = Work(((20.0, 50.0), (1.0, 300.0)))
    assert limit_of(work, 10.0, ceilings) == Limit(0.5, "memory")
    assert limit_of(Work(((20.0, 50.0),)), 10.0, ceilings) == Limit(pytest.approx(0.2), "matrix")
    assert limit_of(work, 1.0, ceilings) == Limit(1.0, "memory")
    assert limit_of(work, 0.0, ceilings) is None and limit_of(Work(), 1.0, ceilings) is None


def test_a_real_probe_end_to_end(tiny: Any, tmp_path: Path, picture_rows: Any) -> None:
    from grpo_autotune.probe.probe import Probe
    from tests.support.trainers import make_trainer

    trainer = make_trainer(tiny("qwen3_vl"), picture_rows, tmp_path, beta=0.05)
    probe = Probe(trainer)
    trainer.train()
    record = probe.record()
    probe.detach()
    fast = ceilings_of(1e12, 1e11)
    report = build_report(record, detect(), fast, config_of(record))
    assert sum(row.self_s for row in report.stages) == pytest.approx(report.step_s, abs=1e-6)
    assert sum(part.self_s for part in report.stage("policy_logprob").parts) == pytest.approx(
        report.stage("policy_logprob").self_s, rel=1e-6
    )
    for name in ("generation", "policy_logprob", "reference_logprob", "backward"):
        share = report.stage(name).limit_share
        assert share is not None and 0.0 < share < 0.5
    assert load_report(save_report(report, tmp_path)) == report
    text = render(report)
    assert "Qwen3VLForConditionalGeneration" in text and "grpo.beta" in text


@pytest.mark.parametrize(("percent", "words"), [(100.0, "1 processor core."), (73.0, "0.73 processor cores.")])
def test_one_core_is_no_cores(percent: float, words: str) -> None:
    used = [Utilisation(stage="backward", samples=8, cpu_percent=percent)]
    assert f"On average this process used {words}" in render(build_report(demo_record(utilisation=used)))
