"""The printed report: complete from `report.json` alone, readable at several widths, and stable (golden files).

After a wanted change of the text, write the golden files anew:
`GOLDEN=write python -m pytest tests/render/test_terminal.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from grpo_autotune.advice.facts import Facts
from grpo_autotune.probe.breakdown import Limit, break_down
from grpo_autotune.records.probe import STAGES, Phase, ProbeRecord, RankTimings
from grpo_autotune.records.report import Report
from grpo_autotune.records.rewards import CallTimes
from grpo_autotune.render.sentences import LEGEND
from grpo_autotune.render.terminal import render
from grpo_autotune.report.build import report_of_facts
from grpo_autotune.report.files import load_report, save_report
from tests.support.sample_records import (
    CPU_MACHINE,
    GPU_MACHINE,
    config_of,
    demo_record,
    judged_record,
    remote_calls,
    timings,
    two_rank_record,
    vllm_record,
)

GOLDEN = Path(__file__).parents[1] / "golden"
LIMITS = {
    "generation": Limit(0.04, "memory"),
    "policy_logprob": Limit(0.30, "matrix"),
    "reference_logprob": Limit(0.31, "matrix"),
    "backward": Limit(0.35, "matrix"),
}
ENGINE = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.4}
VLLM_CONFIG = config_of(vllm_record(), vllm=ENGINE, grpo={"eval_steps": 1})
DEMO_CONFIG = config_of(demo_record(), data={"image_size": 384})

JUDGE = {"name": "exact_match", "concurrency": 4}
SERVICE = {
    "name": "service",
    "kind": "service",
    "place": 1,
    "failures": {"timeout": 1},
    "rate_limited": 3,
    "retries": 4,
}
JUDGED = judged_record(
    remote_calls(),
    remote_calls(**SERVICE, retry_s=CallTimes(p50=0.5, p95=1.0, p99=1.0), tokens_in=0, tokens_out=0, cost=None),
    startup=[Phase(name=name, seconds=2.0) for name in ("model", "judge", "first_generation", "first_reward")],
)


def report_of(record: ProbeRecord, **more: Any) -> Report:
    return report_of_facts(Facts(record=record, breakdown=break_down(record.timings), **more))


REPORTS = {
    "demo": report_of(demo_record(), limits=LIMITS, machine=CPU_MACHINE, config=DEMO_CONFIG),
    "vllm": report_of(vllm_record(), machine=GPU_MACHINE, config=VLLM_CONFIG),
    "two_ranks": report_of(two_rank_record(), machine=CPU_MACHINE),
    "judge": report_of(JUDGED, machine=CPU_MACHINE, config=config_of(JUDGED, rewards=[JUDGE])),
}


@pytest.mark.parametrize("name", REPORTS)
def test_golden(name: str) -> None:
    text, path = render(REPORTS[name]), GOLDEN / f"report_{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("width", [80, 100, 140])
def test_report_json_is_enough_to_print_everything_again(name: str, width: int, tmp_path: Path) -> None:
    report = REPORTS[name]
    save_report(report, tmp_path)
    text = render(load_report(tmp_path), width)
    assert text == render(report, width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_legend_knows_every_stage() -> None:
    assert tuple(LEGEND) == STAGES


def test_every_stage_that_ran_and_every_advice_is_there() -> None:
    for report in REPORTS.values():
        text = render(report)
        flat, first_words = " ".join(text.split()), [line.split()[0] for line in text.splitlines() if line.split()]
        for row in report.stages:
            assert (row.name in first_words) is (row.calls > 0)
        for advice in report.verdict:
            assert advice.text in flat


def test_exact_advice_comes_before_learning_advice() -> None:
    text = render(REPORTS["demo"])
    assert (
        text.index("same learning") < text.index("grpo.dataloader_num_workers") < text.index("alters what is learned")
    )
    assert text.index("alters what is learned") < text.index("Set grpo.beta")


def test_bad_fidelity_is_loud() -> None:
    assert "WARNING: vLLM does not sample from the policy" in render(REPORTS["vllm"])
    assert "WARNING" not in render(REPORTS["demo"])


def test_nothing_to_change_is_said() -> None:
    record = demo_record(timings=timings({"optimizer": 1.0}), tokens=None, images=None, rewards=[], startup=[])
    text = render(report_of(record))
    assert "Nothing: no change that this tool knows is predicted to save one percent of the step." in text


@pytest.mark.parametrize(
    ("phase", "words"),
    [("script", "the script before it built the trainer"), ("before_attach", "the script before attach()")],
)
def test_what_a_script_did_before_is_said_in_words(phase: str, words: str) -> None:
    text = render(report_of(demo_record(startup=[Phase(name=phase, seconds=12.0), Phase(name="trainer", seconds=1.0)])))
    assert f"13.0 s: {words} 12.0 s and building the trainer 1.00 s." in " ".join(text.split())


def test_what_is_taken_out_of_the_stages_is_explained_where_there_are_ranks() -> None:
    assert "reduce_gradients happen within the other stages" in " ".join(render(REPORTS["two_ranks"]).split())
    assert "reduce_gradients" not in render(REPORTS["demo"])


def test_of_many_ranks_those_that_work_longest_have_a_row() -> None:
    record = two_rank_record()
    ranks = [RankTimings(rank=n, step_s=4.0, stages={"backward": n / 25, "sync_wait": 4 - n / 25}) for n in range(100)]
    text = render(report_of(record.model_copy(update={"ranks": ranks})))
    rows = [line.split() for line in text.splitlines()]
    shown = [row[0] for row in rows if row[1:2] == ["4.00"] and row[0].isdecimal()]
    assert shown == [str(n) for n in range(84, 100)]


def test_without_colour_there_are_no_escapes() -> None:
    assert "\x1b" not in render(REPORTS["demo"])
    assert "\x1b" in render(REPORTS["demo"], colour=True)


@pytest.mark.parametrize("field", ["tokens", "images", "machine", "rates", "fidelity", "ranks"])
def test_a_report_without_a_fact_still_prints(field: str) -> None:
    report = REPORTS["two_ranks"].model_copy(update={field: None, "rewards": [], "startup": [], "verdict": []})
    assert "4.52 s per optimizer step" in render(report)


def test_one_core_is_one_core() -> None:
    machine = CPU_MACHINE.model_copy(update={"cores": 1})
    assert "1 core, " in render(report_of(demo_record(), machine=machine, config=DEMO_CONFIG))
